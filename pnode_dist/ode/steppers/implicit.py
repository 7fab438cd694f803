"""Steps that solve equations (theta methods, ARKIMEX, DIRK) and their adjoints, by PETSc's TS, SNES, KSP and PC."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode.given_options import check_read, check_read_by_all, read_at_set_up
from pnode_dist.ode.methods import METHODS, Method
from pnode_dist.ode.rhs.evaluation import BoundFunction, StageState
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.linearisation import Part, Place, Point
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction
from pnode_dist.ode.steppers.base import (
    END_OF_TIME,
    MOST_STEPS,
    PetscOptions,
    Stepper,
    options_database,
    set_from_options,
    set_up_adjoint,
)
from pnode_dist.ode.steppers.current_state import VecState
from pnode_dist.ode.steppers.petsc_callbacks import (
    ExplicitOperator,
    ImplicitFunction,
    ParameterOperator,
    ShiftedOperator,
)
from pnode_dist.ode.steppers.preconditioner import Built, BuiltMatrix, Preconditioner, Setting
from pnode_dist.ode.steppers.tape import Stage, Tape, stages_of
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import calls, vectors

_TYPES = {
    "arkimex": PETSc.TS.Type.ARKIMEX,
    "dirk": PETSc.TS.Type.DIRK,
    "rosw": PETSc.TS.Type.ROSW,
    "bdf": PETSc.TS.Type.BDF,
}
_KEPT_WHILE = 8
"""A preconditioner is made anew within a step when a linear solve took more iterations than this."""
_DIRECTLY_SOLVED = 50_000
"""Up to so many unknowns a linear implicit part is factored rather than iterated on, unless options say otherwise."""


class ImplicitStepper(Stepper):
    """A stepper of the families `theta`, `arkimex` and `dirk`, and forward only of `rosw` and `bdf`.

    Collective on `comm`.

    `options` are PETSc options (without the leading dash) for this solver, SNES, KSP and PC included, on top of those
    on the command line. Where they say nothing, Newton's method stops at a relative residual of 1e-9 (1e-5 where f
    computes in float32) or when an iteration changes the state by less than 1e-12 of itself, and GMRES solves its
    linear systems. The linear systems of the adjoint are solved to the tolerance of the nonlinear ones.
    `linear` is the Mat of a problem whose implicit part is one.

    Raises `ConfigurationError` for options that choose another type of TS, and for a mass matrix that the method's
    adjoint does not take.
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
        linear: MatrixFunction | None = None,
    ) -> None:
        super().__init__(comm, layout)
        self.current = VecState(comm, layout)
        self._lambda = self.current.vec.duplicate()
        self._mu = vectors.create_vec(comm, sum(parameter_sizes))
        self._adjoint = vectors.view(self._lambda, (layout.size,))
        self._parameter_gradient = vectors.view(self._mu, (sum(parameter_sizes),))
        if mass is not None and method.family in ("arkimex", "dirk"):
            raise ConfigurationError(
                f"mass: method = {method.name!r}: PETSc's adjoint of it takes no mass matrix but the identity: must be "
                "one of beuler, cn, theta, or forward only bdf or one of rosw"
            )
        self.method = method
        self.mass = mass
        self.function = ImplicitFunction(layout, parameter_sizes, mass, weakref.WeakMethod(self._new_operator))
        self.built: Built | None = None
        if preconditioner is not None:
            self.built = preconditioner.build(Setting(comm, layout, partition, mass))
        elif linear is not None:
            self.built = BuiltMatrix(linear.matrix, mass)
        self._linear = linear is not None
        self._built_for: tuple[float, float] | None = None
        self._has_parameters = sum(parameter_sizes) > 0
        self.defaults = self._defaults(options)
        self._options = {**self.defaults, **options}
        self._ts = self._active = self.create_ts()
        # None once all have been read.
        self._unread: set[str] | None = read_at_set_up(options)
        self.monitored = set_from_options(self._ts, self._options, self._unread)
        self.finish(self._ts)
        self.method = self._chosen(method)
        self.set_up(self._ts)
        if method.adjoint != "none":
            set_up_adjoint(self._ts)
        check_read(self._unread, later=True)
        self._variant = _theta_variant(self._ts)

    @property
    def callbacks(self) -> ImplicitFunction:
        """What PETSc calls."""
        return self.function

    def destroy(self) -> None:
        """See `Stepper.destroy`."""
        self._ts.destroy()
        self._adjoint = self._parameter_gradient = torch.empty(0)
        self._lambda.destroy()
        self._mu.destroy()
        self.current.destroy()
        # A user's own may have no such method.
        destroy_built = getattr(self.built, "destroy", None)
        if destroy_built is not None:
            destroy_built()
        if self.mass is not None:
            self.mass.destroy()

    @property
    def _petsc(self) -> PETSc.TS:
        return self._ts

    @property
    def is_midpoint(self) -> bool:
        """Whether the method is a theta method whose only stage lies inside the step."""
        theta, endpoint = self._variant
        return self.method.family == "theta" and theta != 1.0 and not endpoint

    def bind(self, bound: BoundFunction) -> None:
        """Solve this problem from now on."""
        self.function.bound = bound
        self.function.splits = self.method.family == "arkimex" and isinstance(bound.func, SplitFunction)

    @property
    def _bound(self) -> BoundFunction:
        assert self.function.bound is not None
        return self.function.bound

    # Set-up

    def _defaults(self, options: PetscOptions) -> dict[str, Any]:
        """What holds where neither the caller's options nor those on the command line say anything."""
        rtol, stol = _newton_tolerances(self.layout.compute_dtype)
        defaults: dict[str, Any] = {"snes_rtol": rtol, "snes_stol": stol, "ksp_type": "gmres"}
        if self.built is None:
            defaults["pc_type"] = "none"
        if self.method.family == "rosw":
            defaults["ts_rosw_type"] = self.method.petsc_name
        if self._linear:
            defaults |= {"snes_type": "ksponly", "ksp_rtol": rtol}
            if self.current.vec.getSize() <= _DIRECTLY_SOLVED and isinstance(self.built, BuiltMatrix):
                defaults["pc_type"] = "lu" if self.comm.size == 1 else "redundant"
                # Whoever has a say in the iteration is to have one.
                if not any(name.removeprefix("-").startswith("ksp_") for name in options):
                    defaults["ksp_type"] = "preonly"
        given = PETSc.Options()
        return {name: value for name, value in defaults.items() if not given.hasName(name)}

    def create_ts(self) -> PETSc.TS:
        """A TS for this method on this stepper's callbacks and state; its options are still to be set. Collective."""
        method, function = self.method, self.function
        ts = PETSc.TS().create(comm=self.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        if method.family == "theta":
            ts.setType(method.petsc_name)
        else:
            ts.setType(_TYPES[method.family])
            if method.family in ("arkimex", "dirk"):
                (ts.setARKIMEXType if method.family == "arkimex" else ts.setDIRKType)(method.petsc_name)
        if self.mass is None and method.adjoint != "none":
            # With any other type PETSc's adjoints of ARKIMEX are wrong without a word.
            ts.setEquationType(PETSc.TS.EquationType.ODE_EXPLICIT)
        operator = self._shell(ShiftedOperator(function))
        matrix = operator if self.built is None or self.built.matrix is None else self.built.matrix
        ts.setIFunction(function.residual, self.current.vec.duplicate())
        ts.setIJacobian(function.jacobian, operator, matrix)
        if method.family == "arkimex":
            explicit = self._shell(ExplicitOperator(function))
            ts.setRHSFunction(function.explicit, self.current.vec.duplicate())
            ts.setRHSJacobian(function.explicit_jacobian, explicit, explicit)
        if method.adjoint == "none":
            pass
        elif self._has_parameters:
            ts.setIJacobianP(function.parameter_jacobian, self._parameters(Part.IMPLICIT))
            if method.family == "arkimex":
                ts.setRHSJacobianP(function.explicit_parameter_jacobian, self._parameters(Part.EXPLICIT))
            ts.setCostGradients([self._lambda], [self._mu])
        else:
            ts.setCostGradients([self._lambda])
        ts.setSolution(self.current.vec)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        if self.built is not None and self.built.context is not None:
            pc = ts.getSNES().getKSP().getPC()
            pc.setType(PETSc.PC.Type.PYTHON)
            pc.setPythonContext(self.built.context)
        return ts

    def _shell(self, context: Any) -> PETSc.Mat:
        local = self.layout.size
        mat = PETSc.Mat().createPython(((local, None), (local, None)), context, comm=self.comm)
        mat.setUp()
        return mat

    def _parameters(self, part: Part) -> PETSc.Mat:
        columns = self._mu.getLocalSize()
        context = ParameterOperator(self.function, part)
        mat = PETSc.Mat().createPython(((self.layout.size, None), (columns, None)), context, comm=self.comm)
        mat.setUp()
        return mat

    def set_up(self, ts: PETSc.TS) -> None:
        """Let `ts`, whose options are set, make its Vecs. Collective."""
        function = self.function
        function.solves_for_slope = self.method.petsc_name.startswith("es")
        if function.solves_for_slope:
            ts.getSNES().setInitialGuess(function.initial_guess)
        ts.setUp()
        if self.method.adjoint != "none":
            function.stage_handles.update(calls.stage_handles(ts))

    def finish(self, ts: PETSc.TS) -> None:
        """Leave to us what becomes of a step that failed."""
        ts.setMaxSteps(MOST_STEPS)
        ts.setMaxTime(END_OF_TIME)
        ts.setErrorIfStepFails(False)
        # PETSc would make the step smaller by itself where its equations cannot be solved.
        ts.setMaxSNESFailures(1)
        ts.setMaxStepRejections(0)

    def _chosen(self, method: Method) -> Method:
        """The method that the options left in place."""
        chosen, wanted = self._ts.getType(), method.petsc_name if method.family == "theta" else _TYPES[method.family]
        if chosen != wanted:
            raise ConfigurationError(f"ts_type = {chosen!r}: must be {wanted!r} (choose the method by name)")
        if method.family not in ("arkimex", "dirk"):
            return method
        table = self._ts.getARKIMEXType() if method.family == "arkimex" else self._ts.getDIRKType()
        return METHODS[f"{method.family}_{table}"]

    # Steps

    def step(
        self,
        number: int,
        time: float,
        size: float,
        tape: Tape | None = None,
        isolate: bool = False,
        level: str = "graph",
    ) -> None:
        """See `Stepper.step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks where the equations of a stage cannot be solved.
        """
        # Only the multistep methods, which have no adjoint, may know of the steps before.
        if self.method.family != "bdf" or number == 0:
            self._ts.restartStep()
        self.function.keeps_values = level == "stages" and tape is not None and self._bound.guard is not None
        with self.errors_of_func():
            reason = self.attempt(self._ts, number, time, size)
            if reason < 0:
                raise ConvergenceError(f"step {number} at t = {time:.6g}, {size:.3g} long: {self._words(self._ts)}")
            self._store_fingerprint(self.current.parts)
            if tape is not None:
                tape.extend(self.stage_tape(self._ts, time, size, level))

    def attempt(self, ts: PETSc.TS, number: int, time: float, size: float) -> int:
        """One step of `ts` on the current state: PETSc's reason, negative if it failed. Collective."""
        direction = math.copysign(1.0, size)
        self._active = ts
        self.function.start_step(time, direction)
        self._built_for = self._built_for if self._linear else None
        ts.setTime(direction * time)
        ts.setTimeStep(direction * size)
        ts.setStepNumber(number)
        ksp = ts.getSNES().getKSP()
        newton, linear = ts.getSNESIterations(), calls.total_linear_iterations(ksp)
        # Some of PETSc's solvers read their options when they are first used.
        with options_database(self._options, self._unread):
            ts.step()
        bound = self._bound
        bound.newton_iterations += ts.getSNESIterations() - newton
        linear = calls.total_linear_iterations(ksp) - linear
        bound.linear_iterations += linear
        if self._unread is not None and linear:
            check_read_by_all(self._unread, self.comm)
            self._unread = None
        reason = int(ts.getConvergedReason())
        if reason < 0:
            ts.setConvergedReason(PETSc.TS.ConvergedReason.ITERATING)
        return reason

    def stage_tape(self, ts: PETSc.TS, time: float, size: float, level: str) -> list[Stage]:
        """What an adjoint needs of the step that `ts` just took: its stages, as graphs or as states. Collective."""
        found: list[Stage] = []
        for part, handle in self._places(ts):
            when = self._stage_time(ts, part, handle, time, size)
            point = self.function.point(part, when, self._stage_inputs(handle))
            if isinstance(point.func, MatrixFunction):
                found.append(StageState(when, point.inputs) if point.bound.needs_time_gradient else None)
            elif level != "stages":
                found.append(point.bound.graph(point.func, self.layout, when, point.inputs))
            else:
                found.append(
                    StageState(when, point.inputs, fingerprint=self.function.value_at(part, when, point.inputs))
                )
        return found

    def _places(self, ts: PETSc.TS) -> list[Place]:
        """The parts of the right-hand side and the Vecs that the adjoint of a step differentiates them at, in order."""
        handles = calls.stage_handles(ts)
        if self.method.family == "theta":
            theta, endpoint = self._variant
            handles = handles[-1:] if theta == 1.0 or not endpoint else handles
            return [(Part.IMPLICIT, handle) for handle in handles]
        parts = [Part.IMPLICIT, Part.EXPLICIT] if self.function.splits else [Part.IMPLICIT]
        return [(part, handle) for handle in handles for part in parts]

    def _stage_inputs(self, handle: int) -> tuple[torch.Tensor, ...]:
        flat = torch.from_numpy(calls.local_array(handle, self.layout.size))
        return self.layout.inputs(self.layout.parts(flat), copy=True)

    def _stage_time(self, ts: PETSc.TS, part: Part, handle: int, time: float, size: float) -> float:
        if self.method.family != "theta":
            # An explicit first stage may not have been evaluated by itself.
            return self.function.times.get((part, handle), time)
        theta, endpoint = self._variant
        if handle != self.current.vec.handle:
            return time if endpoint or theta == 1.0 else time + theta * size
        return time + size

    def _wrote_adjoint(self) -> None:
        for vec in (self._lambda, self._mu):
            vectors.wrote(vec)

    def close_segment(self) -> None:
        """See `Stepper.close_segment`: every step is recorded by itself."""

    def start_adjoint(self) -> None:
        """See `Stepper.start_adjoint`."""
        self._adjoint.zero_()
        self._parameter_gradient.zero_()
        self._wrote_adjoint()

    def _solution(self) -> PETSc.Vec:
        return self.current.vec

    def take_time_gradients(self) -> tuple[float, float]:
        """See `Stepper.take_time_gradients`."""
        last = self._parameter_gradient[-2:]
        first, second = last.tolist()
        last.zero_()
        self._wrote_adjoint()
        return first, second

    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """See `Stepper.add_to_adjoint`."""
        for target, part in zip(self.layout.parts(self._adjoint), parts, strict=True):
            if part is not None:
                target.add_(part.to(target.device))
        self._wrote_adjoint()

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`."""
        sizes = [shape.numel() for shape in shapes]
        pieces = torch.split(self._parameter_gradient[: sum(sizes)].clone(), sizes)
        gradient = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return self.layout.parts(self._adjoint.clone()), gradient

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """See `Stepper.adjoint_step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks where a transposed linear system cannot be solved.
        """
        ts = self._active = self._ts
        direction = math.copysign(1.0, size)
        kept = dict(zip(self._places(ts), stages_of(tape), strict=True))
        tape.clear()
        self.function.start_adjoint(time, direction, kept)
        self._built_for = self._built_for if self._linear else None
        ts.setTime(direction * (time + size))
        ts.setTimeStep(-direction * size)
        ts.setStepNumber(number + 1)
        snes = ts.getSNES()
        ksp = snes.getKSP()
        forward = ksp.getTolerances()
        ksp.setTolerances(rtol=min(forward[0], snes.getTolerances()[0]))
        before = calls.total_linear_iterations(ksp)
        try:
            with self.errors_of_func(), options_database(self._options):
                ts.adjointStep()
        finally:
            ksp.setTolerances(*forward)
        self._bound.adjoint_linear_iterations += calls.total_linear_iterations(ksp) - before
        if int(ts.getConvergedReason()) < 0:
            ts.setConvergedReason(PETSc.TS.ConvergedReason.ITERATING)
            raise ConvergenceError(
                f"the adjoint of step {number} at t = {time:.6g}, {size:.3g} long: a transposed linear system was not "
                f"solved: {_reason(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())} after "
                f"{ksp.getIterationNumber()} iterations: choose another preconditioner, ksp_max_it or ksp_type"
            )

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        bound = self._bound
        values = bound.value(bound.func, self.layout, time, self.layout.inputs(self.current.parts))
        return torch.cat([value.detach().reshape(-1).to(self.current.flat) for value in values])

    def _new_operator(self, point: Point, shift: float) -> None:
        """Bring the preconditioner up to date, where that is due. Collective on `comm`."""
        if self.built is None or shift == 0.0:
            return
        wanted = (shift, point.sign)
        if self._built_for == wanted:
            ksp = self._active.getSNES().getKSP()
            if self._linear or ksp.getIterationNumber() <= _KEPT_WHILE:
                return
        self.built.update(point, shift)
        self._built_for = wanted

    def _words(self, ts: PETSc.TS) -> str:
        """Why the equations of a step could not be solved."""
        snes = ts.getSNES()
        ksp = snes.getKSP()
        reason = snes.getConvergedReason()
        text = (
            f"the nonlinear solve ended with {_reason(PETSc.SNES.ConvergedReason, reason)} after "
            f"{snes.getIterationNumber()} iterations, residual {snes.getFunctionNorm():.3g}"
        )
        if reason == PETSc.SNES.ConvergedReason.DIVERGED_LINEAR_SOLVE:
            text += f" (linear solve: {_reason(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())})"
        return text + ": make step_size smaller, give a preconditioner, or change PETSc's snes_* and ksp_* options"


def _newton_tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """How far a residual and a Newton step can be brought down, relatively, where f computes in `dtype`."""
    if dtype == torch.float64:
        return 1e-9, 1e-12
    return (1e-5, 1e-7) if dtype == torch.float32 else (1e-2, 1e-3)


def _theta_variant(ts: PETSc.TS) -> tuple[float, bool]:
    """Theta, and whether the method is the one with the endpoints as stages; of other types nothing to speak of."""
    kind = ts.getType()
    if kind == PETSc.TS.Type.BEULER:
        return 1.0, False
    if kind == PETSc.TS.Type.CN:
        return 0.5, True
    if kind == PETSc.TS.Type.THETA:
        return float(ts.getTheta()), bool(ts.getThetaEndpoint())
    return 0.0, False


def _reason(reasons: Any, number: int) -> str:
    """PETSc's name of a reason for convergence or divergence."""
    names = [name for name, value in vars(reasons).items() if value == number and not name.startswith("_")]
    return max(names, key=len, default=str(number))
