"""One TS: a step forward, a step recorded, a step of the adjoint.

PETSc keeps all of the numerics (TSStep, TSAdjointStep); which steps are taken is decided outside. Every step starts
afresh from the state it is given, so its result depends on nothing but (t, h, u): a step that is run again gives the
same bits, whatever ran in between.

H. Zhang, E. M. Constantinescu, B. F. Smith: PETSc TSAdjoint: a discrete adjoint ODE solver for first-order and
second-order sensitivity analysis, SIAM J. Sci. Comput. 44 (2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.layout import StateLayout
from pnode_dist.ode.methods import Method, by_petsc_name
from pnode_dist.ode.rhs import ParameterJacobian, Problem, Recording, RightHandSide, StateJacobian
from pnode_dist.partition import protocol

PetscOptions = Mapping[str, Any]
_END_OF_TIME = 1e300


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


class Stepper:
    """PETSc's TS for one layout of the state, one method and one set of parameter sizes. Collective on `comm`.

    `state` and `adjoint` are this rank's parts of the current state and of its adjoint, `parameter_gradient` the
    part of the gradient with respect to the parameters that this rank has gathered; all are tensors in PETSc's
    scalar type that share memory with PETSc (`state_array` is `state` for NumPy). After writing through them call
    `touched()`. `stepping` says that a step is under way, `failed` that one ended with an error, after which the
    stepper cannot be used again.

    `options` are PETSc options (without the leading dash) for this solver, on top of those on the command line.
    Raises `ConfigurationError` if they choose a type other than an explicit Runge-Kutta method of the table.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        layout: StateLayout,
        method: Method,
        parameter_sizes: tuple[int, ...],
        options: PetscOptions,
    ) -> None:
        self.comm, self.layout = comm, layout
        self.failed = self.stepping = False
        self.rhs = RightHandSide(layout, parameter_sizes)
        self.solution = protocol.create_vec(comm, layout.size)
        self._slope = self.solution.duplicate()
        self._lambda = self.solution.duplicate()
        self._lambda.zeroEntries()
        self.state = protocol.view(self.solution, (layout.size,))
        self.state_array: np.ndarray[Any, Any] = self.state.numpy()
        self.adjoint = protocol.view(self._lambda, (layout.size,))
        parameters = sum(parameter_sizes)
        self._mu = protocol.create_vec(comm, parameters)
        self.parameter_gradient = protocol.view(self._mu, (parameters,))
        self._ts = self._create_ts(method, parameters > 0, options)
        self.method = by_petsc_name(self._ts.getRKType())
        self.rhs.skipped_stage = None if self.method.last_stage_weighs else self.method.stages - 1
        self.rhs.fsal = self.method.fsal
        self.rhs.last_index = self.method.stages - 1

    def _create_ts(self, method: Method, has_parameters: bool, options: PetscOptions) -> PETSc.TS:
        local = self.layout.size
        jacobian = PETSc.Mat().createPython(((local, None), (local, None)), StateJacobian(self.rhs), comm=self.comm)
        jacobian.setUp()
        ts = PETSc.TS().create(comm=self.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(PETSc.TS.Type.RK)
        ts.setRKType(method.petsc_name)
        ts.setRHSFunction(self.rhs.function, self.solution.duplicate())
        ts.setRHSJacobian(_matrix_free, jacobian, jacobian)
        if has_parameters:
            columns = self._mu.getLocalSize()
            by_parameters = PETSc.Mat().createPython(
                ((local, None), (columns, None)), ParameterJacobian(self.rhs), comm=self.comm
            )
            by_parameters.setUp()
            ts.setRHSJacobianP(_matrix_free, by_parameters)
            ts.setCostGradients([self._lambda], [self._mu])
        else:
            ts.setCostGradients([self._lambda])
        ts.setSolution(self.solution)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setMaxSteps(2**31 - 1)
        ts.setMaxTime(_END_OF_TIME)
        # petsc4py has no TSAdapt object: the options database is the way to turn step control off.
        with options_database({**options, "ts_adapt_type": "none"}):
            try:
                ts.setFromOptions()
            except PETSc.Error as error:
                reason = str(error).strip().splitlines()[-1].partition("] ")[2]
                raise ConfigurationError(f"petsc options: {reason}") from None
            self.monitored = any(name.startswith("ts_monitor") for name in PETSc.Options().getAll())
        if ts.getType() != PETSc.TS.Type.RK:
            raise ConfigurationError(
                f"ts_type = {ts.getType()!r}: must be 'rk' (choose the method by name, or its table by ts_rk_type)"
            )
        # Only the adjoint's set-up insists on a TSTrajectory. Kept any longer it would make a directory on disk.
        ts.setSaveTrajectory()
        ts.adjointSetUp()
        ts.removeTrajectory()
        return ts

    def bind(self, problem: Problem) -> None:
        """Solve this problem from now on."""
        self.rhs.problem = problem

    def touched(self) -> None:
        """Tell PETSc that `state`, `adjoint` or `parameter_gradient` were written to."""
        self.solution.stateIncrease()
        self._lambda.stateIncrease()
        self._mu.stateIncrease()

    def set_state(self, parts: tuple[torch.Tensor, ...]) -> None:
        """Copy the parts of a state into the current state."""
        for target, part in zip(self.layout.parts(self.state), parts, strict=True):
            target.copy_(part)
        self.solution.stateIncrease()

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
        this stepper. The last stage of an FSAL method is its result, to the last bit, so that an evaluation of it is
        that of the next step's first stage. A negative `size` goes backward in time; PETSc, which steps forward only,
        then sees du/ds = -f(-s, u), s = -t. Collective on `comm`.
        """
        direction = self.rhs.direction = math.copysign(1.0, size)
        self.rhs.start_step(recording, isolate, level)
        ts = self._ts
        ts.setTime(direction * time)
        ts.setTimeStep(direction * size)
        ts.setStepNumber(number)
        ts.restartStep()
        with self.errors_of_func():
            ts.step()
        if self.method.fsal:
            # PETSc sums the same terms for both, grouped otherwise.
            self.state.copy_(self.rhs.last_stage)
            self.solution.stateIncrease()

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """du/dt at `time` in the current state, flat, in a solve that goes in `direction` (1 or -1). Collective."""
        self.rhs.direction = direction
        self.rhs.start_step(None, False, "graph")
        with self.errors_of_func():
            self.rhs.function(self._ts, direction * time, self.solution, self._slope)
        return direction * protocol.view(self._slope, (self.layout.size,))

    def adjoint_step(self, number: int, time: float, size: float, recording: Recording) -> None:
        """Take `adjoint` and `parameter_gradient` back over step `number`, which was recorded. Collective on `comm`."""
        direction = self.rhs.direction = math.copysign(1.0, size)
        self.rhs.start_adjoint(recording)
        ts = self._ts
        ts.setTime(direction * (time + size))
        ts.setTimeStep(-direction * size)
        ts.setStepNumber(number + 1)
        with self.errors_of_func():
            ts.adjointStep()

    @contextmanager
    def errors_of_func(self) -> Iterator[None]:
        """While PETSc steps: raise what func raised instead of PETSc's error code."""
        self.stepping = True
        try:
            yield
        except BaseException:
            # PETSc does not unwind: its Vecs stay locked, so this TS is of no further use.
            self.failed = True
            error, self.rhs.error = self.rhs.error, None
            if error is None:
                raise
            raise error from None
        finally:
            self.stepping = False
            self.rhs.end_step()

    def monitor(self, number: int, time: float, size: float) -> None:
        """Run PETSc's monitors (`-ts_monitor`, ...) on the current state, if there are any. Collective on `comm`."""
        if self.monitored:
            self._ts.setTimeStep(size)
            self._ts.monitor(number, time, self.solution)


def _matrix_free(*arguments: Any) -> None:
    """The Jacobians are applied from recorded stages: there is nothing to assemble."""
