"""Explicit Runge-Kutta steps (TSRK) and their adjoints."""

from __future__ import annotations

import math

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.evaluation import Problem, Recording
from pnode_dist.ode.layout import StateLayout
from pnode_dist.ode.methods import Method, by_petsc_name
from pnode_dist.ode.rhs import ParameterJacobian, RightHandSide, StateJacobian
from pnode_dist.ode.stepper import (
    END_OF_TIME,
    MOST_STEPS,
    PetscOptions,
    Stepper,
    matrix_free,
    set_from_options,
    set_up_adjoint,
)
from pnode_dist.partition import protocol

_TYPES = {"rk": PETSc.TS.Type.RK, "ssp": PETSc.TS.Type.SSP}


class ExplicitStepper(Stepper):
    """A stepper of the family `rk`, and forward only of `ssp`. Collective on `comm`.

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
        super().__init__(comm, layout, parameter_sizes)
        self.rhs = RightHandSide(layout, parameter_sizes)
        self._ts = self._create_ts(method, sum(parameter_sizes) > 0, options)
        self.method = by_petsc_name(self._ts.getRKType()) if method.family == "rk" else method
        self.rhs.skipped_stage = None if self.method.last_stage_weighs else self.method.stages - 1
        self.rhs.fsal = self.method.fsal
        self.rhs.last_index = self.method.stages - 1

    @property
    def callbacks(self) -> RightHandSide:
        """What PETSc calls."""
        return self.rhs

    def bind(self, problem: Problem) -> None:
        """Solve this problem from now on."""
        self.rhs.bind(problem)

    @property
    def _petsc(self) -> PETSc.TS:
        return self._ts

    def _create_ts(self, method: Method, has_parameters: bool, options: PetscOptions) -> PETSc.TS:
        local = self.layout.size
        jacobian = PETSc.Mat().createPython(((local, None), (local, None)), StateJacobian(self.rhs), comm=self.comm)
        jacobian.setUp()
        ts = PETSc.TS().create(comm=self.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(_TYPES[method.family])
        if method.family == "rk":
            ts.setRKType(method.petsc_name)
        else:
            options = {"ts_ssp_type": method.petsc_name, **options}
        ts.setRHSFunction(self.rhs.function, self.solution.duplicate())
        ts.setRHSJacobian(matrix_free, jacobian, jacobian)
        if has_parameters:
            columns = self._mu.getLocalSize()
            by_parameters = PETSc.Mat().createPython(
                ((local, None), (columns, None)), ParameterJacobian(self.rhs), comm=self.comm
            )
            by_parameters.setUp()
            ts.setRHSJacobianP(matrix_free, by_parameters)
            ts.setCostGradients([self._lambda], [self._mu])
        else:
            ts.setCostGradients([self._lambda])
        ts.setSolution(self.solution)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setMaxSteps(MOST_STEPS)
        ts.setMaxTime(END_OF_TIME)
        self.monitored = set_from_options(ts, options)
        if ts.getType() != _TYPES[method.family]:
            raise ConfigurationError(
                f"ts_type = {ts.getType()!r}: must be {_TYPES[method.family]!r} (choose the method by name, or its "
                f"table by ts_{method.family}_type)"
            )
        if method.adjoint != "none":
            set_up_adjoint(ts)
        return ts

    def step(
        self,
        number: int,
        time: float,
        size: float,
        recording: Recording | None = None,
        isolate: bool = False,
        level: str = "graph",
    ) -> None:
        """See `Stepper.step`. Collective on `comm`.

        The last stage of an FSAL method is its result, to the last bit, so that an evaluation of it is that of the
        next step's first stage.
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
            protocol.wrote(self.solution, self.layout.vec_device)

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        self.rhs.direction = direction
        self.rhs.start_step(None, False, "graph")
        with self.errors_of_func():
            self.rhs.function(self._ts, direction * time, self.solution, self._slope)
        return direction * protocol.view(self._slope, (self.layout.size,), self.layout.vec_device)

    def adjoint_step(self, number: int, time: float, size: float, recording: Recording) -> None:
        """See `Stepper.adjoint_step`. Collective on `comm`."""
        direction = self.rhs.direction = math.copysign(1.0, size)
        self.rhs.start_adjoint(recording, time)
        ts = self._ts
        ts.setTime(direction * (time + size))
        ts.setTimeStep(-direction * size)
        ts.setStepNumber(number + 1)
        with self.errors_of_func():
            ts.adjointStep()
