"""The stepper of fully implicit Runge-Kutta methods, by PETSc's SNES, KSP and PC on all stages at once.

PETSc's own TSIRK has Gauss methods alone, needs an assembled Jacobian, and has no adjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode.given_options import check_read, check_read_by_all, read_at_set_up
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.ode.steppers.adjoint_sums import AdjointSums
from pnode_dist.ode.steppers.base import (
    PetscOptions,
    SingleStepper,
    options_database,
    refused_options,
    set_from_options,
)
from pnode_dist.ode.steppers.current_state import VecState
from pnode_dist.ode.steppers.implicit_ts import failure_of, newton_tolerances, reason_name
from pnode_dist.ode.steppers.irk.equations import StackedStages
from pnode_dist.ode.steppers.irk.preconditioner import StagesPreconditioner
from pnode_dist.ode.steppers.irk.tableau import IRK_TABLES
from pnode_dist.ode.steppers.preconditioner import Built, Preconditioner, Setting
from pnode_dist.ode.steppers.tape import Tape, stages_of
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import vectors


class IrkStepper(SingleStepper):
    """A stepper of the family `irk`. Options and tolerances are those of `ImplicitStepper`.

    The options `pc_*` are for the preconditioner of one stage, see `StagesPreconditioner`; `ksp_*` and `snes_*` are for
    the solvers of all stages. Collective on `comm`. Raises `ConfigurationError` for options that PETSc refuses, and for
    a linear solver that does not iterate.
    """

    current: VecState

    def __init__(
        self,
        comm: MPI.Comm,
        layout: StateLayout,
        method: Method,
        parameter_sizes: tuple[int, ...],
        options: PetscOptions,
        partition: Partition | None = None,
        mass: MassMatrix | None = None,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        super().__init__(comm, layout)
        self.current = VecState(comm, layout)
        self.method, self.mass, self.tableau = method, mass, IRK_TABLES[method.name]
        self._sums = AdjointSums(layout, len(parameter_sizes))
        self.equations = StackedStages(layout, mass, self.tableau)
        self.built: Built | None = None
        if preconditioner is not None:
            self.built = preconditioner.build(Setting(comm, layout, partition, mass))
        self._preconditioner = StagesPreconditioner(comm, self.equations, self.built)
        self.equations.on_new_operator = self._preconditioner.update
        size = self.tableau.stages * layout.size
        self._stages, self._cotangents = vectors.create_vec(comm, size), vectors.create_vec(comm, size)
        self._ts = PETSc.TS().create(comm=comm)
        self._ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        self._snes = self._created_snes(size)
        self._options = {**self._defaults(), **options}
        # None once PETSc has read all options.
        self._unread: set[str] | None = read_at_set_up(options)
        self.monitored = set_from_options(self._ts, self._options, self._unread)
        with options_database(self._options, self._unread), refused_options():
            self._snes.setFromOptions()
            self._preconditioner.set_from_options()
        check_read(self._unread, later=True)
        kind = self._snes.getKSP().getType()
        if kind in (PETSc.KSP.Type.PREONLY, "none"):
            raise ConfigurationError(
                f"ksp_type = {kind!r}: the preconditioner of coupled stages is not their inverse: must be a type that "
                "iterates, such as gmres"
            )

    def _created_snes(self, size: int) -> PETSc.SNES:
        snes = PETSc.SNES().create(comm=self.comm)
        operator = PETSc.Mat().createPython(((size, None), (size, None)), self.equations, comm=self.comm)
        operator.setUp()
        snes.setFunction(self.equations.residual, self._stages.duplicate())
        snes.setJacobian(self.equations.jacobian, operator, operator)
        ksp = snes.getKSP()
        ksp.setOperators(operator, operator)
        pc = ksp.getPC()
        # The options pc_* are for the preconditioner of a stage.
        pc.setOptionsPrefix("of_all_stages_")
        pc.setType(PETSc.PC.Type.PYTHON)
        pc.setPythonContext(self._preconditioner)
        return snes

    def _defaults(self) -> dict[str, Any]:
        rtol, stol = newton_tolerances(self.layout.compute_dtype)
        defaults: dict[str, Any] = {"snes_rtol": rtol, "snes_stol": stol, "ksp_type": "gmres"}
        given = PETSc.Options()
        return {name: value for name, value in defaults.items() if not given.hasName(name)}

    @property
    def callbacks(self) -> StackedStages:
        """The callbacks of the SNES."""
        return self.equations

    @property
    def _bound(self) -> BoundFunction:
        assert self.equations.bound is not None
        return self.equations.bound

    @property
    def _petsc(self) -> PETSc.TS:
        return self._ts

    def _solution(self) -> PETSc.Vec:
        return self.current.vec

    # One step and its adjoint

    def step(self, number: int, time: float, size: float, tape: Tape | None = None, level: str = "graph") -> None:
        """See `SingleStepper.step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks if the equations of the stages cannot be solved.
        """
        equations = self.equations
        with self.errors_of_func():
            equations.start_step(time, size, self.current.flat.clone())
            stages = equations.view(self._stages)
            # The guess does not depend on earlier steps, so that a recomputed step has the same bits.
            stages.copy_(self.current.flat)
            vectors.wrote(self._stages)
            self._solve(number, time, size)
            self.current.set_flat(self.tableau.result(self.current.flat, stages))
            self._store_fingerprint(self.current.parts)
            if tape is not None:
                tape.extend(equations.kept(stages, level))

    def _solve(self, number: int, time: float, size: float) -> None:
        snes, bound = self._snes, self._bound
        self._preconditioner.start_step()
        # Some of PETSc's solvers read their options at their first use.
        with options_database(self._options, self._unread):
            snes.solve(None, self._stages)
        linear = snes.getLinearSolveIterations()
        bound.newton_iterations += snes.getIterationNumber()
        bound.linear_iterations += linear
        if self._unread is not None and linear:
            check_read_by_all(self._unread, self.comm)
            self._unread = None
        if snes.getConvergedReason() < 0:
            raise ConvergenceError(f"step {number} at t = {time:.6g}, {size:.3g} long: {failure_of(snes)}")

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """See `SingleStepper.adjoint_step`. Collective on `comm`.

        With the adjoint of the result the stages have the cotangents d_j adjoint, d = `ends`. K being the Jacobian of
        the stages' equations, K^T nu = these cotangents. Then the gradient of the parameters is the sum of
        (df/dtheta)^T nu_i, and the adjoint before the step is (1 - sum_j d_j) adjoint + scale sum_ij W_ij M^T nu_i.
        Raises `ConvergenceError` on all ranks if the transposed linear system cannot be solved.
        """
        equations, tableau, sums = self.equations, self.tableau, self._sums
        stages = stages_of(tape)
        tape.clear()
        adjoint = torch.cat([part.reshape(-1) for part in sums.adjoint])
        with self.errors_of_func():
            points = equations.start_adjoint(time, size, stages)
            equations.view(self._cotangents).copy_(torch.outer(tableau.ends, adjoint))
            vectors.wrote(self._cotangents)
            self._solve_transposed(number, time, size, points)
            found = equations.view(self._stages).clone()
            for vector, point in zip(found, points, strict=True):
                sums.add_to_gradient(point.parameter_products(vector, time))
            moved = equations.multiplied((tableau.row_sums @ found).unsqueeze(0), transposed=True)[0]
        before = moved * equations.scale
        if not tableau.ends_in_last_stage:
            before += (1.0 - float(tableau.ends.sum())) * adjoint
        sums.adjoint = list(self.layout.parts(before))

    def _solve_transposed(self, number: int, time: float, size: float, points: Sequence[Point]) -> None:
        """Solve with the transposed Jacobian at `points`: the right side is in `_cotangents`, the result in `_stages`.

        To the tolerance of the nonlinear equations.
        """
        snes, ksp = self._snes, self._snes.getKSP()
        forward = ksp.getTolerances()
        ksp.setTolerances(rtol=min(forward[0], snes.getTolerances()[0]))
        self._preconditioner.start_step()
        try:
            with options_database(self._options):
                self._preconditioner.update(points, self.equations.scale, ksp)
                ksp.getOperators()[0].assemble()
                ksp.solveTranspose(self._cotangents, self._stages)
        finally:
            ksp.setTolerances(*forward)
        self._bound.adjoint_linear_iterations += ksp.getIterationNumber()
        if ksp.getConvergedReason() < 0:
            raise ConvergenceError(
                f"the adjoint of step {number} at t = {time:.6g}, {size:.3g} long: a transposed linear system was not "
                f"solved: {reason_name(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())} after "
                f"{ksp.getIterationNumber()} iterations: choose another preconditioner, ksp_max_it or ksp_type"
            )

    # The rest of the interface of `Stepper`

    def start_adjoint(self) -> None:
        """See `Stepper.start_adjoint`."""
        self._sums.start()

    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """See `Stepper.add_to_adjoint`."""
        self._sums.add_to_adjoint(parts)

    def change_adjoint(self, change: Callable[[Sequence[torch.Tensor]], Parts]) -> None:
        """See `Stepper.change_adjoint`."""
        self._sums.adjoint = list(change(self._sums.adjoint))

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`."""
        return self._sums.end(shapes)

    def take_time_gradients(self) -> tuple[float, float]:
        """See `SingleStepper.take_time_gradients`."""
        return self._sums.take_time_gradients()

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        bound, layout = self._bound, self.layout
        values = bound.value(bound.func, layout, time, layout.inputs(self.current.parts))
        return torch.cat([value.detach().reshape(-1).to(self.current.flat) for value in values])

    def destroy(self) -> None:
        """See `Stepper.destroy`."""
        for made in (self._snes, self._ts, self._stages, self._cotangents):
            made.destroy()
        self._preconditioner.destroy()
        self.current.destroy()
        # A preconditioner of the user's may have no such method.
        destroy_built = getattr(self.built, "destroy", None)
        if destroy_built is not None:
            destroy_built()
        if self.mass is not None:
            self.mass.destroy()
