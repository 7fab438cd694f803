"""What the steppers have in common: the Vecs of a state and its adjoint, and errors that come through PETSc.

A stepper takes one step forward, records one, and takes one back; which steps are taken is decided outside. Every
step starts afresh from the state it is given, so its result depends on nothing but (t, h, u): a step that is run again
gives the same bits, whatever ran in between.

H. Zhang, E. M. Constantinescu, B. F. Smith: PETSc TSAdjoint: a discrete adjoint ODE solver for first-order and
second-order sensitivity analysis, SIAM J. Sci. Comput. 44 (2022).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import petsc_calls
from pnode_dist.ode.evaluation import Problem, Recording
from pnode_dist.ode.layout import StateLayout
from pnode_dist.ode.methods import Method
from pnode_dist.partition import protocol

PetscOptions = Mapping[str, Any]
END_OF_TIME = 1e300
MOST_STEPS = 2**31 - 1


@contextmanager
def options_database(options: PetscOptions) -> Iterator[None]:
    """Put `options` into PETSc's options database for a while."""
    database = PETSc.Options()
    before = {name: database.getString(name) for name in options if database.hasName(name)}
    for name, value in options.items():
        database.setValue(name, value)
    try:
        yield
    finally:
        for name in options:
            if name in before:
                database.setValue(name, before[name])
            else:
                database.delValue(name)


class Callbacks(Protocol):
    """What PETSc calls during a step. `error` is what the right-hand side raised in it."""

    problem: Problem | None
    error: BaseException | None

    def end_step(self) -> None:
        """Say that a step or its adjoint is over."""
        ...


class Stepper(ABC):
    """PETSc's TS for one layout of the state, one method and one set of parameter sizes. Collective on `comm`.

    `state` and `adjoint` are this rank's parts of the current state and of its adjoint, `parameter_gradient` the
    part of the gradient with respect to the parameters that this rank has gathered; all are tensors in PETSc's
    scalar type that share memory with PETSc. After writing through them call `touched()`. `stepping` says that a step
    is under way, `failed` that one ended with an error, after which the stepper cannot be used again. `monitored`: the
    options ask for PETSc's monitors.
    """

    method: Method
    monitored = False

    def __init__(self, comm: MPI.Comm, layout: StateLayout, parameter_sizes: tuple[int, ...]) -> None:
        petsc_calls.one_blas_thread()
        self.comm, self.layout = comm, layout
        self.failed = self.stepping = False
        self._errors_of_func = ErrorsOfFunc(self)
        device = layout.vec_device
        self.solution = protocol.create_vec(comm, layout.size, device)
        self._slope = self.solution.duplicate()
        self._lambda = self.solution.duplicate()
        self._lambda.zeroEntries()
        self.state = protocol.view(self.solution, (layout.size,), device)
        self._host = self.state
        if device is not protocol.HOST:
            self._host = torch.empty(layout.size, dtype=self.state.dtype, pin_memory=device.type == "cuda")
        self._host_array: np.ndarray[Any, Any] = self._host.numpy()
        self.adjoint = protocol.view(self._lambda, (layout.size,), device)
        parameters = sum(parameter_sizes)
        self._mu = protocol.create_vec(comm, parameters, device)
        self.parameter_gradient = protocol.view(self._mu, (parameters,), device)

    @property
    @abstractmethod
    def callbacks(self) -> Callbacks:
        """What PETSc calls."""

    @abstractmethod
    def step(
        self,
        number: int,
        time: float,
        size: float,
        recording: Recording | None = None,
        isolate: bool = False,
        level: str = "graph",
    ) -> None:
        """Advance the current state from `time` by `size`; into `recording`, if given, go the stages' graphs.

        With the `level` "stages" their states go there instead; with `isolate` the recording survives further steps of
        this stepper. A negative `size` goes backward in time; PETSc, which steps forward only, then sees
        du/ds = -f(-s, u), s = -t. Collective on `comm`.
        """

    @abstractmethod
    def adjoint_step(self, number: int, time: float, size: float, recording: Recording) -> None:
        """Take `adjoint` and `parameter_gradient` back over step `number`, which was recorded. Collective on `comm`."""

    @abstractmethod
    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """f at `time` in the current state, flat, in a solve that goes in `direction` (1 or -1). Collective."""

    def bind(self, problem: Problem) -> None:
        """Solve this problem from now on."""
        self.callbacks.problem = problem

    def touched(self) -> None:
        """Tell PETSc that `state`, `adjoint` or `parameter_gradient` were written to."""
        for vec in (self.solution, self._lambda, self._mu):
            protocol.wrote(vec, self.layout.vec_device)

    @property
    def state_array(self) -> np.ndarray[Any, Any]:
        """The current state for NumPy, to be read: PETSc's memory, or a copy where that is a device's."""
        if self._host is not self.state:
            self._host.copy_(self.state)
        return self._host_array

    def overwrite_state(self, write: Callable[[np.ndarray[Any, Any]], None]) -> None:
        """Let `write` fill an array with another state."""
        write(self._host_array)
        if self._host is not self.state:
            self.state.copy_(self._host)
        protocol.wrote(self.solution, self.layout.vec_device)

    def set_state(self, parts: tuple[torch.Tensor, ...]) -> None:
        """Copy the parts of a state into the current state."""
        for target, part in zip(self.layout.parts(self.state), parts, strict=True):
            target.copy_(part)
        protocol.wrote(self.solution, self.layout.vec_device)

    def errors_of_func(self) -> ErrorsOfFunc:
        """While PETSc steps: raise what func raised instead of PETSc's error code."""
        return self._errors_of_func

    @property
    @abstractmethod
    def _petsc(self) -> PETSc.TS:
        """The TS that runs the monitors."""

    def monitor(self, number: int, time: float, size: float) -> None:
        """Run PETSc's monitors (`-ts_monitor`, ...) on the current state, if there are any. Collective on `comm`."""
        if self.monitored:
            self._petsc.setTimeStep(size)
            self._petsc.monitor(number, time, self.solution)


class ErrorsOfFunc:
    """The context in which a stepper steps. It is entered for every step: one made of a generator takes five times as
    long."""

    def __init__(self, stepper: Stepper) -> None:
        # The stepper holds this.
        self._stepper = weakref.ref(stepper)

    def __enter__(self) -> None:
        self._of().stepping = True

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: Any) -> None:
        stepper = self._of()
        callbacks = stepper.callbacks
        error, callbacks.error = callbacks.error, None
        stepper.stepping = False
        callbacks.end_step()
        if raised is not None:
            # PETSc does not unwind: its Vecs stay locked, so this TS is of no further use.
            stepper.failed = True
            if error is not None:
                raise error from None

    def _of(self) -> Stepper:
        stepper = self._stepper()
        assert stepper is not None
        return stepper


def set_from_options(ts: PETSc.TS, options: PetscOptions) -> bool:
    """Let PETSc's options set up `ts`, without control of its steps; whether they ask for monitors.

    Raises `ConfigurationError` for what PETSc refuses.
    """
    # petsc4py has no TSAdapt object: the options database is the way to turn step control off.
    with options_database({**options, "ts_adapt_type": "none"}):
        try:
            ts.setFromOptions()
        except PETSc.Error as error:
            reason = str(error).strip().splitlines()[-1].partition("] ")[2]
            raise ConfigurationError(f"petsc options: {reason}") from None
        return any(name.startswith("ts_monitor") for name in PETSc.Options().getAll())


def set_up_adjoint(ts: PETSc.TS) -> None:
    """Set up the adjoint of `ts`, whose gradients have been given."""
    # Only the adjoint's set-up insists on a TSTrajectory. Kept any longer it would make a directory on disk.
    ts.setSaveTrajectory()
    ts.adjointSetUp()
    ts.removeTrajectory()


def matrix_free(*arguments: Any) -> None:
    """The Jacobian callback of shell Mats that are applied from recorded stages: there is nothing to assemble."""
