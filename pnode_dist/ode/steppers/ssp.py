"""Strong stability preserving steps, forward only, by PETSc (TSSSP)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.steppers.base import END_OF_TIME, MOST_STEPS, PetscOptions, SingleStepper, set_from_options
from pnode_dist.ode.steppers.current_state import VecState
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.petsc import unwinding, vectors


class SspStepper(SingleStepper):
    """A stepper of the family `ssp`. Collective on `comm`.

    `options` are PETSc options (without the leading dash) for this solver, on top of those on the command line.
    Raises `ConfigurationError` if they choose another type.
    """

    current: VecState

    def __init__(self, comm: MPI.Comm, layout: StateLayout, method: Method, options: PetscOptions) -> None:
        super().__init__(comm, layout)
        self.current = VecState(comm, layout)
        self.method = method
        self._rhs = _RightHandSide(layout)
        self._slope = self.current.vec.duplicate()
        self._ts = ts = PETSc.TS().create(comm=comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(PETSc.TS.Type.SSP)
        ts.setRHSFunction(self._rhs.function, self.current.vec.duplicate())
        ts.setSolution(self.current.vec)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setMaxSteps(MOST_STEPS)
        ts.setMaxTime(END_OF_TIME)
        unread = read_at_set_up(options)
        self.monitored = set_from_options(ts, {"ts_ssp_type": method.petsc_name, **options}, unread)
        check_read(unread)
        if ts.getType() != PETSc.TS.Type.SSP:
            raise ConfigurationError(
                f"ts_type = {ts.getType()!r}: must be 'ssp' (choose the method by name, or its table by ts_ssp_type)"
            )

    @property
    def callbacks(self) -> _RightHandSide:
        """The callbacks of the TS."""
        return self._rhs

    def destroy(self) -> None:
        """See `Stepper.destroy`."""
        self._ts.destroy()
        self._slope.destroy()
        self.current.destroy()

    @property
    def _petsc(self) -> PETSc.TS:
        return self._ts

    def _solution(self) -> PETSc.Vec:
        return self.current.vec

    def step(
        self,
        number: int,
        time: float,
        size: float,
        tape: Tape | None = None,
        level: str = "graph",
    ) -> None:
        """See `SingleStepper.step`. There is no tape. Collective on `comm`."""
        assert tape is None
        direction = self._rhs.direction = math.copysign(1.0, size)
        ts = self._ts
        ts.setTime(direction * time)
        ts.setTimeStep(direction * size)
        ts.setStepNumber(number)
        ts.restartStep()
        with self.errors_of_func():
            ts.step()

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        self._rhs.direction = direction
        with self.errors_of_func():
            self._rhs.function(self._ts, direction * time, self.current.vec, self._slope)
        return direction * vectors.view(self._slope, (self.layout.size,), self.layout.vec_device)

    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> NoReturn:
        """See `adjoint_step`."""
        raise NotImplementedError

    def change_adjoint(self, change: Callable[[Sequence[torch.Tensor]], Parts]) -> NoReturn:
        """See `adjoint_step`."""
        raise NotImplementedError

    def start_adjoint(self) -> NoReturn:
        """See `adjoint_step`."""
        raise NotImplementedError

    def take_time_gradients(self) -> NoReturn:
        """See `adjoint_step`."""
        raise NotImplementedError

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> NoReturn:
        """See `adjoint_step`."""
        raise NotImplementedError

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> NoReturn:
        """Raise `NotImplementedError`: PETSc has no adjoint of these methods, and `odeint` refuses their gradients."""
        raise NotImplementedError


class _RightHandSide:
    """The RHSFunction of the TS. Holds no reference to the TS, whose own references could not be collected.

    `direction` is -1 when time decreases and PETSc integrates -f over -t (see `Stepper.step`).
    """

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout
        self.direction = 1.0
        self.bound: BoundFunction | None = None
        self.error: BaseException | None = None

    def end_step(self) -> None:
        """See `Callbacks.end_step`: nothing is held between steps."""

    def function(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction: f = func(t, u)."""
        # PETSc turns an exception into an error code. The stepper raises the exception stored here instead.
        try:
            bound, layout = self.bound, self._layout
            assert bound is not None
            inputs = layout.inputs(self._parts(u)) if layout.converts else self._parts(u)
            values = bound.value(bound.func, layout, self.direction * t, inputs)
            for part, value in zip(self._parts(f), values, strict=True):
                torch.mul(value.to(part), self.direction, out=part)
            vectors.wrote(f, layout.vec_device)
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise

    def _parts(self, vec: PETSc.Vec) -> Parts:
        layout = self._layout
        return layout.parts(vectors.view(vec, (layout.size,), layout.vec_device))
