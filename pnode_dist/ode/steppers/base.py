"""What the steppers have in common: a current state and its adjoint, and errors that come through PETSc.

A stepper takes one step forward, records one, and takes one back; which steps are taken is decided outside. Every
step starts afresh from the state it is given, so its result depends on nothing but (t, h, u): a step that is run again
gives the same bits, whatever ran in between.

H. Zhang, E. M. Constantinescu, B. F. Smith: PETSc TSAdjoint: a discrete adjoint ODE solver for first-order and
second-order sensitivity analysis, SIAM J. Sci. Comput. 44 (2022).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.steppers.current_state import CurrentState
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.petsc import calls

PetscOptions = Mapping[str, Any]
END_OF_TIME = 1e300
MOST_STEPS = 2**31 - 1


@contextmanager
def options_database(options: PetscOptions, unread: set[str] | None = None) -> Iterator[None]:
    """Put `options` into PETSc's options database for a while, and remove from `unread` those that are read then."""
    database = PETSc.Options()
    known = database.getAll().keys() if unread else ()
    before = {name: database.getString(name) for name in options if database.hasName(name)}
    for name, value in options.items():
        if unread and name in before:
            # With it goes the mark that it was read before.
            database.delValue(name)
        database.setValue(name, value)
    try:
        yield
    finally:
        if unread:
            unread -= {name for name in unread if database.used(name)}
            # PETSc puts another name in the place of one that is out of date.
            renamed = {name for name in unread if not database.hasName(name)}
            unread -= renamed
            for name in database.getAll().keys() - known - {name.removeprefix("-") for name in options}:
                if renamed:
                    database.delValue(name)
        for name in options:
            if name in before:
                database.setValue(name, before[name])
            else:
                database.delValue(name)


class Callbacks(Protocol):
    """What PETSc calls during a step. `error` is what the right-hand side raised in it."""

    bound: BoundFunction | None
    error: BaseException | None

    def end_step(self) -> None:
        """Say that a step or its adjoint is over."""
        ...


class Stepper(ABC):
    """PETSc's TS for one layout of the state, one method and one set of parameter sizes. Collective on `comm`.

    `current` is the state it is at. `stepping` says that a step is under way, `failed` that one ended with an error,
    after which the stepper cannot be used again. `monitored`: the options ask for PETSc's monitors. With `fingerprints`
    each step leaves the `fingerprint` of its result, also where that is not formed.
    """

    method: Method
    current: CurrentState
    monitored = False
    fingerprints = False
    fingerprint: float | None = None

    def __init__(self, comm: MPI.Comm, layout: StateLayout) -> None:
        calls.one_blas_thread()
        self.comm, self.layout = comm, layout
        self.failed = self.stepping = False
        self._errors_of_func = ErrorsOfFunc(self)

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
        tape: Tape | None = None,
        isolate: bool = False,
        level: str = "graph",
    ) -> None:
        """Advance the current state from `time` by `size`. Collective on `comm`.

        Append to `tape`, if given, the step's data for its adjoint. At the `level` "graph" this is torch's graph of
        the step, at "stage graphs" one graph for each stage, at "stages" the states of the stages. With `isolate` the
        tape stays valid after further steps of this stepper. Its graph may then be one segment with the steps before,
        until `close_segment` is called.
        A negative `size` goes backward in time. PETSc steps forward only, and then sees du/ds = -f(-s, u), s = -t.
        """

    @abstractmethod
    def close_segment(self) -> None:
        """Know that an adjoint begins, or is added to, at the current state, or that no more is recorded."""

    @abstractmethod
    def start_adjoint(self) -> None:
        """Begin a backward pass: adjoint and gradient by the parameters are zero."""

    @abstractmethod
    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """Add to the adjoint of the state, part by part, None for zero. They are not written into."""

    @abstractmethod
    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """End it: the adjoint, and the gradient by the first parameters in their shapes, to be read alone."""

    @abstractmethod
    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """Take adjoint and gradient back over step `number`, which was recorded. Collective on `comm`."""

    @abstractmethod
    def take_time_gradients(self) -> tuple[float, float]:
        """The gradient by the last two parameters so far, each one number, which starts from zero again."""

    @abstractmethod
    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """f at `time` in the current state, flat, in a solve that goes in `direction` (1 or -1). Collective."""

    def bind(self, bound: BoundFunction) -> None:
        """Solve this problem from now on."""
        self.callbacks.bound = bound

    def _store_fingerprint(self, parts: Parts) -> None:
        """Leave the fingerprint of a step's result."""
        if self.fingerprints:
            self.fingerprint = fingerprint(parts)

    def errors_of_func(self) -> ErrorsOfFunc:
        """While PETSc steps: raise what func raised instead of PETSc's error code."""
        return self._errors_of_func

    @abstractmethod
    def destroy(self) -> None:
        """Destroy every PETSc object of this stepper, which cannot be used after that. Collective on `comm`."""

    @property
    @abstractmethod
    def _petsc(self) -> PETSc.TS:
        """The TS that runs the monitors."""

    @abstractmethod
    def _solution(self) -> PETSc.Vec:
        """The current state as a Vec, to be read."""

    def monitor(self, number: int, time: float, size: float) -> None:
        """Run PETSc's monitors (`-ts_monitor`, ...) on the current state, if there are any. Collective on `comm`."""
        if self.monitored:
            self._petsc.setTimeStep(size)
            self._petsc.monitor(number, time, self._solution())


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


def set_from_options(ts: PETSc.TS, options: PetscOptions, unread: set[str]) -> bool:
    """Let PETSc's options set up `ts`, without control of its steps; whether they ask for monitors.

    Those that are read are removed from `unread`. Raises `ConfigurationError` for what PETSc refuses.
    """
    # petsc4py has no TSAdapt object: the options database is the way to turn step control off.
    with options_database({**options, "ts_adapt_type": "none"}, unread):
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
