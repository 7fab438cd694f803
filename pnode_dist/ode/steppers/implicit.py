"""Implicit steps (theta methods, ARKIMEX, DIRK) and their discrete adjoints, by PETSc's TS, SNES, KSP and PC."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode.given_options import check_read, check_read_by_all, read_at_set_up
from pnode_dist.ode.methods import TAKE_MASS, Method, has_adjoint
from pnode_dist.ode.rhs.evaluation import BoundFunction, StageState
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.linearisation import Part, Place, Point
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.ode.rhs.parameters import real_numbers
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction
from pnode_dist.ode.steppers.additive_tableau import petsc_tableau
from pnode_dist.ode.steppers.base import (
    PetscOptions,
    SingleStepper,
    options_database,
    set_from_options,
    set_up_adjoint,
)
from pnode_dist.ode.steppers.current_state import VecState
from pnode_dist.ode.steppers.implicit_ts import (
    TsParts,
    chosen_method,
    default_options,
    failure_of,
    reason_name,
    stop_at_failure,
    theta_variant,
)
from pnode_dist.ode.steppers.petsc_callbacks import (
    ImplicitFunction,
)
from pnode_dist.ode.steppers.preconditioner import Built, BuiltMatrix, Preconditioner, Setting
from pnode_dist.ode.steppers.tape import Stage, Tape, stages_of
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import calls, vectors

_MOST_ITERATIONS = 8
"""A preconditioner is rebuilt within a step if a linear solve takes more iterations than this."""


class ImplicitStepper(SingleStepper):
    """A stepper of the families `theta`, `arkimex` and `dirk`, and forward only of `rosw` and `bdf`.

    `options` are PETSc options (without the leading dash) for the TS and its SNES, KSP and PC. They come on top of
    those on the command line. By default Newton's method stops at a relative residual of 1e-9 (1e-5 if f computes in
    float32), or after an iteration that changes the state by less than 1e-12 of itself, and GMRES solves its linear
    systems. The linear systems of the adjoint are solved to the tolerance of the nonlinear ones. `linear` is the
    implicit part if that is a Mat.

    Collective on `comm`. Raises `ConfigurationError` for options that choose another type of TS, and for a mass matrix
    that the method's adjoint does not support.
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
                f"one of {TAKE_MASS}, or forward only bdf or one of rosw"
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
        self._parts = TsParts(
            comm, method, self.function, self.current.vec, self._lambda, self._mu, sum(parameter_sizes) > 0, self.built
        )
        self.defaults = default_options(self._parts, options, layout.compute_dtype, self._linear)
        self._options = {**self.defaults, **options}
        self._ts = self._active = self.create_ts()
        # None once PETSc has read all options.
        self._unread: set[str] | None = read_at_set_up(options)
        self.monitored = set_from_options(self._ts, self._options, self._unread)
        stop_at_failure(self._ts)
        self.method = chosen_method(self._ts, method)
        self.set_up(self._ts)
        if has_adjoint(method):
            set_up_adjoint(self._ts)
        check_read(self._unread, later=True)
        self._variant = theta_variant(self._ts)

    @property
    def callbacks(self) -> ImplicitFunction:
        """The callbacks of the TS."""
        return self.function

    def destroy(self) -> None:
        """See `Stepper.destroy`."""
        self._ts.destroy()
        self._adjoint = self._parameter_gradient = torch.empty(0)
        self._lambda.destroy()
        self._mu.destroy()
        self.current.destroy()
        # A preconditioner of the user's may have no such method.
        destroy_built = getattr(self.built, "destroy", None)
        if destroy_built is not None:
            destroy_built()
        if self.mass is not None:
            self.mass.destroy()

    @property
    def _petsc(self) -> PETSc.TS:
        return self._ts

    @property
    def theta_variant(self) -> tuple[float, bool]:
        """Theta, and True if the ends of the step are its stages; of theta methods."""
        return self._variant

    @property
    def is_midpoint(self) -> bool:
        """True for a theta method whose only stage lies inside the step."""
        theta, endpoint = self._variant
        return self.method.family == "theta" and theta != 1.0 and not endpoint

    def bind(self, bound: BoundFunction) -> None:
        """See `Stepper.bind`."""
        self.function.bound = bound
        self.function.splits = self.method.family == "arkimex" and isinstance(bound.func, SplitFunction)

    @property
    def _bound(self) -> BoundFunction:
        assert self.function.bound is not None
        return self.function.bound

    def create_ts(self) -> PETSc.TS:
        """Create another TS on this stepper's callbacks and state. Its options are not set yet. Collective."""
        return self._parts.create_ts()

    def set_up(self, ts: PETSc.TS) -> None:
        """Create the Vecs of `ts`, whose options are set. Collective."""
        function = self.function
        function.solves_for_slope = self.method.family == "dirk" and petsc_tableau(self.method).implicit[0][0] == 0
        if function.solves_for_slope:
            ts.getSNES().setInitialGuess(function.initial_guess)
        ts.setUp()
        if has_adjoint(self.method):
            function.stage_handles.update(calls.stage_handles(ts))

    # Steps

    def step(
        self,
        number: int,
        time: float,
        size: float,
        tape: Tape | None = None,
        level: str = "graph",
    ) -> None:
        """See `SingleStepper.step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks if the equations of a stage cannot be solved.
        """
        # Only multistep methods, which have no adjoint, may use earlier steps.
        if self.method.family != "bdf" or number == 0:
            self._ts.restartStep()
        self.function.keeps_values = level == "stages" and tape is not None and self._bound.guard is not None
        with self.errors_of_func():
            reason = self.attempt(self._ts, number, time, size)
            if reason < 0:
                raise ConvergenceError(
                    f"step {number} at t = {time:.6g}, {size:.3g} long: {failure_of(self._ts.getSNES())}"
                )
            self._store_fingerprint(self.current.parts)
            if tape is not None:
                tape.extend(self.stage_tape(self._ts, time, size, level))

    def attempt(self, ts: PETSc.TS, number: int, time: float, size: float) -> int:
        """Take one step of `ts` on the current state. Returns PETSc's reason, negative for a failure. Collective."""
        direction = math.copysign(1.0, size)
        self._active = ts
        self.function.start_step(time, direction)
        self._built_for = self._built_for if self._linear else None
        ts.setTime(direction * time)
        ts.setTimeStep(direction * size)
        ts.setStepNumber(number)
        ksp = ts.getSNES().getKSP()
        newton, linear = ts.getSNESIterations(), calls.total_linear_iterations(ksp)
        # Some of PETSc's solvers read their options at their first use.
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
        """Return the stages of the step that `ts` just took, as graphs or as states, for its adjoint. Collective."""
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
        """Return the evaluations that the adjoint of a step differentiates, in order: the part, and its state's Vec."""
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
            # PETSc may not have evaluated an explicit first stage.
            return self.function.times.get((part, handle), time)
        theta, endpoint = self._variant
        if handle != self.current.vec.handle:
            return time if endpoint or theta == 1.0 else time + theta * size
        return time + size

    def _wrote_adjoint(self) -> None:
        for vec in (self._lambda, self._mu):
            vectors.wrote(vec)

    def start_adjoint(self) -> None:
        """See `Stepper.start_adjoint`."""
        self._adjoint.zero_()
        self._parameter_gradient.zero_()
        self._wrote_adjoint()

    def _solution(self) -> PETSc.Vec:
        return self.current.vec

    def take_time_gradients(self) -> tuple[float, float]:
        """See `SingleStepper.take_time_gradients`."""
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

    def change_adjoint(self, change: Callable[[Sequence[torch.Tensor]], Parts]) -> None:
        """See `Stepper.change_adjoint`."""
        adjoint = self.layout.parts(self._adjoint)
        for target, part in zip(adjoint, change(adjoint), strict=True):
            target.copy_(part)
        self._wrote_adjoint()

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`."""
        assert self.function.bound is not None
        parameters = self.function.bound.parameters.tensors[: len(shapes)]
        sizes = [*map(real_numbers, parameters)]
        pieces = torch.split(self._parameter_gradient[: sum(sizes)].clone(), sizes)
        numbers = [
            torch.view_as_complex(piece.view(-1, 2)) if parameter.is_complex() else piece
            for piece, parameter in zip(pieces, parameters, strict=True)
        ]
        gradient = [piece.view(shape) for piece, shape in zip(numbers, shapes, strict=True)]
        return self.layout.parts(self._adjoint.clone()), gradient

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """See `SingleStepper.adjoint_step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks if a transposed linear system cannot be solved.
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
                f"solved: {reason_name(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())} after "
                f"{ksp.getIterationNumber()} iterations: choose another preconditioner, ksp_max_it or ksp_type"
            )

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        bound = self._bound
        values = bound.value(bound.func, self.layout, time, self.layout.inputs(self.current.parts))
        return torch.cat([value.detach().reshape(-1).to(self.current.flat) for value in values])

    def _new_operator(self, point: Point, shift: float) -> None:
        """Rebuild the preconditioner for `point` and `shift` if needed. Collective on `comm`."""
        if self.built is None or shift == 0.0:
            return
        wanted = (shift, point.sign)
        if self._built_for == wanted:
            ksp = self._active.getSNES().getKSP()
            if self._linear or ksp.getIterationNumber() <= _MOST_ITERATIONS:
                return
        self.built.update(point, shift)
        self._built_for = wanted
