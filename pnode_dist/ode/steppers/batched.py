"""Implicit steps of many small independent systems, solved as a batch: the adapter to `Stepper`.

`pnode_dist.ode.steppers.batched_step` holds the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode import methods
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.additive_tableau import AdditiveTableau, petsc_tableau, theta_tableau
from pnode_dist.ode.steppers.adjoint_sums import AdjointSums
from pnode_dist.ode.steppers.base import PetscOptions, SingleStepper, options_database, set_from_options
from pnode_dist.ode.steppers.batched_newton import NewtonTolerances
from pnode_dist.ode.steppers.batched_problem import BatchProblem, are_coupled
from pnode_dist.ode.steppers.batched_samples import Split, mass_blocks
from pnode_dist.ode.steppers.batched_segment import BatchedSegments
from pnode_dist.ode.steppers.batched_step import advance, pull_back, record
from pnode_dist.ode.steppers.compiled_segment import CompiledSegments, CompiledTape, between_jumps
from pnode_dist.ode.steppers.current_state import TensorState
from pnode_dist.ode.steppers.implicit import ImplicitStepper
from pnode_dist.ode.steppers.implicit_ts import chosen_method, newton_tolerances, set_type, theta_variant
from pnode_dist.ode.steppers.irk import batch
from pnode_dist.ode.steppers.irk.stepper import IrkStepper
from pnode_dist.ode.steppers.irk.tableau import IRK_TABLES, IrkTableau
from pnode_dist.ode.steppers.tape import Tape, stages_of
from pnode_dist.ode.steppers.traced_implicit import ImplicitStep


class BatchedStepper(SingleStepper):
    """A stepper of implicit Runge-Kutta and theta methods for small samples that do not depend on one another.

    `split` divides the state into samples. At the first step of a solve the derivative of f is compared with its
    blocks. If samples depend on one another, the solve's steps are those of `by_petsc()`; with `only` that is an error.
    Options and tolerances are those of `ImplicitStepper`. Collective on `comm`.
    """

    current: TensorState

    def __init__(
        self,
        comm: MPI.Comm,
        layout: StateLayout,
        method: Method,
        parameter_sizes: tuple[int, ...],
        options: PetscOptions,
        split: Split,
        mass: MassMatrix | None,
        by_petsc: Callable[[], ImplicitStepper | IrkStepper],
        only: bool,
    ) -> None:
        super().__init__(comm, layout)
        self.current = TensorState(layout)
        self.method, self._tableau, self._tolerances, self.theta_variant = _configured(
            method, options, layout.compute_dtype
        )
        self._split, self._only = split, only
        self._mass = None if mass is None else mass_blocks(mass, layout, split)
        self._by_petsc = by_petsc
        self._other: ImplicitStepper | IrkStepper | None = None
        self._other_has_begun = False
        self._sums = AdjointSums(layout, len(parameter_sizes))
        self._problem: BatchProblem | None = None
        self._compiled: BatchedSegments | None = None
        self.error: BaseException | None = None

    def to_compile(self) -> ImplicitStep | None:
        """Return what a compiled step is traced of; None for methods whose stages are one system."""
        problem = self._problem
        assert problem is not None
        if self._stacks:
            # Compiled code of all stages at once was slower: one factorisation serves several iterations.
            return None
        split = Split(problem.samples, problem.widths)
        return ImplicitStep(problem.implicit, problem.explicit, self.layout, problem.additive, split)

    def use_compiled(self, compiled: CompiledSegments | None) -> None:
        """Take segments by compiled code from now on, where it converges."""
        self._compiled = None
        step = None if compiled is None else self.to_compile()
        if compiled is not None and step is not None:
            self._compiled = BatchedSegments(compiled, step, self._tolerances, self.comm)

    @property
    def limits_and_mass(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Newton's tolerances and the blocks of the mass matrix."""
        return self._tolerances.limits, self._mass

    @property
    def joined_state(self) -> torch.Tensor:
        """The current state as `[sample, component]`."""
        assert self._problem is not None
        return self._problem.joined(self.current.parts)

    def advance(self, segment: Segment) -> None:
        """See `Stepper.advance`."""
        if self._runs_compiled(segment):
            assert self._compiled is not None
            self.stepping = True
            try:
                after = self._compiled.advance(self._bound, segment, self.joined_state)
            finally:
                self.stepping = False
            if after is not None:
                self._set_after(after)
                return
        super().advance(segment)

    def record(self, segment: Segment, level: str) -> Tape:
        """See `Stepper.record`. A compiled segment at the level "stages" has the state before it for a tape."""
        if self._runs_compiled(segment):
            assert self._compiled is not None
            before, tape = self.joined_state, None
            self.stepping = True
            try:
                if level == "stages":
                    after = self._compiled.advance(self._bound, segment, before)
                    tape = CompiledTape((before,))
                elif (found := self._compiled.record(self._bound, segment, before)) is not None:
                    after, tape = found
            finally:
                self.stepping = False
            if tape is not None and after is not None:
                self._set_after(after)
                return [tape]
        return super().record(segment, level)

    def pull_back(self, segment: Segment, tape: Tape) -> list[tuple[float, float]]:
        """See `Stepper.pull_back`."""
        recorded = tape[0]
        if not isinstance(recorded, CompiledTape):
            return super().pull_back(segment, tape)
        tape.clear()
        problem, sums, batch = self._problem, self._sums, self._compiled
        assert problem is not None
        assert batch is not None
        bound = problem.bound
        self.stepping = True
        try:
            if not recorded.roots:
                again = batch.record(bound, segment, recorded.start[0])
                assert again is not None, "a recomputed segment converges as before"
                recorded = again[1]
            adjoint = (problem.joined(sums.adjoint),)
            (before,), parameters, by_times = batch.compiled.pull_back(bound, recorded, adjoint)
        finally:
            self.stepping = False
        sums.add_to_gradient([*parameters, *((None, None) if bound.needs_time_gradient else ())])
        sums.adjoint = list(problem.parts(before))
        return by_times

    def _runs_compiled(self, segment: Segment) -> bool:
        return self._compiled is not None and not self._is_coupled and between_jumps(self._bound, self.layout, segment)

    def _set_after(self, state: torch.Tensor) -> None:
        """Make the result of a compiled segment the current state."""
        problem = self._problem
        assert problem is not None
        # Compiled code has compared all entries of the derivative with its blocks.
        problem.bound.coupled = False
        self._set(problem, state)
        self._store_fingerprint(self.current.parts)

    def step(
        self,
        number: int,
        time: float,
        size: float,
        tape: Tape | None = None,
        level: str = "graph",
    ) -> None:
        """See `SingleStepper.step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks if the equations of a stage cannot be solved, and `ConfigurationError` if
        samples depend on one another and no other stepper is allowed.
        """
        problem = self._problem
        assert problem is not None
        bound = problem.bound
        self.stepping = True
        try:
            with torch.no_grad():
                state = problem.joined(self.current.parts)
                if bound.coupled is None:
                    self._compare(problem, time, size, state)
                if bound.coupled:
                    self._step_by_petsc(number, time, size, tape, level)
                else:
                    self._set(problem, self._step_as_batch(problem, number, time, size, state, tape, level))
            self._store_fingerprint(self.current.parts)
        finally:
            self.stepping = False

    def _step_as_batch(
        self,
        problem: BatchProblem,
        number: int,
        time: float,
        size: float,
        state: torch.Tensor,
        tape: Tape | None,
        level: str,
    ) -> torch.Tensor:
        try:
            if tape is None:
                return (batch.advance if self._stacks else advance)(problem, time, size, state)
            after, stages = (batch.record if self._stacks else record)(problem, time, size, state, level)
        except ConvergenceError as error:
            raise ConvergenceError(f"step {number} {error}") from None
        tape.extend(stages)
        return after

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """See `SingleStepper.adjoint_step`. Collective on `comm`.

        Raises `ConvergenceError` on all ranks if a transposed linear system cannot be solved.
        """
        if self._is_coupled:
            with self._by_petsc_alone() as other:
                other.adjoint_step(number, time, size, tape)
            return
        problem, sums = self._problem, self._sums
        assert problem is not None
        stages = stages_of(tape)
        tape.clear()
        self.stepping = True
        try:
            pulled_back = batch.pull_back if self._stacks else pull_back
            before, found = pulled_back(problem, time, size, stages, problem.joined(sums.adjoint))
        except ConvergenceError as error:
            raise ConvergenceError(f"the adjoint of step {number} {error}") from None
        finally:
            self.stepping = False
        for gradients in found:
            sums.add_to_gradient(gradients)
        sums.adjoint = list(problem.parts(before))

    # The rest of the interface of `Stepper`

    @property
    def callbacks(self) -> BatchedStepper:
        """The stepper itself. PETSc calls f only in steps of the other stepper, which binds f for each."""
        return self

    def end_step(self) -> None:
        """See `Callbacks.end_step`: nothing is held between steps."""

    @property
    def bound(self) -> BoundFunction | None:
        """The right-hand side that is bound."""
        return None if self._problem is None else self._problem.bound

    @bound.setter
    def bound(self, bound: BoundFunction | None) -> None:
        self._problem = None if bound is None else self._problem_of(bound)

    def bind(self, bound: BoundFunction) -> None:
        """See `Stepper.bind`."""
        if bound is not self.bound:
            self.bound = bound

    def start_adjoint(self) -> None:
        """See `Stepper.start_adjoint`."""
        self._sums.start()
        self._other_has_begun = False

    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """See `Stepper.add_to_adjoint`."""
        if self._is_coupled:
            with self._by_petsc_alone() as other:
                other.add_to_adjoint(parts)
        else:
            self._sums.add_to_adjoint(parts)

    def change_adjoint(self, change: Callable[[Sequence[torch.Tensor]], Parts]) -> None:
        """See `Stepper.change_adjoint`."""
        if self._is_coupled:
            with self._by_petsc_alone() as other:
                other.change_adjoint(change)
        else:
            self._sums.adjoint = list(change(self._sums.adjoint))

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`."""
        if self._is_coupled:
            with self._by_petsc_alone() as other:
                return other.end_adjoint(shapes)
        return self._sums.end(shapes)

    def take_time_gradients(self) -> tuple[float, float]:
        """See `SingleStepper.take_time_gradients`."""
        if self._is_coupled:
            with self._by_petsc_alone() as other:
                return other.take_time_gradients()
        return self._sums.take_time_gradients()

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        bound, layout = self._bound, self.layout
        values = bound.value(bound.func, layout, time, layout.inputs(self.current.parts))
        return torch.cat([layout.scalar(value.detach()).reshape(-1) for value in values])

    def destroy(self) -> None:
        """See `Stepper.destroy`. There are PETSc objects only if samples depended on one another."""
        if self._other is not None:
            self._other.destroy()

    @property
    def _petsc(self) -> PETSc.TS:
        raise AssertionError("PETSc's monitors need PETSc's own steps")

    def _solution(self) -> PETSc.Vec:
        raise AssertionError("PETSc's monitors need PETSc's own steps")

    @property
    def _bound(self) -> BoundFunction:
        assert self.bound is not None
        return self.bound

    @property
    def _stacks(self) -> bool:
        """True if all stages of a step are one system."""
        return isinstance(self._tableau, IrkTableau)

    @property
    def _is_coupled(self) -> bool:
        return self._bound.coupled is True

    def _problem_of(self, bound: BoundFunction) -> BatchProblem:
        tableau = self._tableau
        implicit, explicit = bound.func, None
        if self.method.family == "arkimex" and isinstance(bound.func, SplitFunction):
            implicit, explicit = bound.func.implicit, bound.func.explicit
        elif isinstance(tableau, AdditiveTableau):
            tableau = tableau.without_explicit_part
        return BatchProblem(
            bound,
            self.layout,
            self.comm,
            *self._split,
            implicit,
            explicit,
            tableau,
            self._mass,
            self._tolerances,
        )

    def _set(self, problem: BatchProblem, state: torch.Tensor) -> None:
        self.current.set(problem.parts(state))

    # Samples that depend on one another

    def _compare(self, problem: BatchProblem, time: float, size: float, state: torch.Tensor) -> None:
        """Decide whether PETSc takes the steps of this solve. Collective on `comm`."""
        bound = problem.bound
        counts = bound.counts()
        bound.coupled = are_coupled(problem, time + size / 3, size, state)
        bound.count_from(counts)
        if bound.coupled:
            # PETSc's Newton method takes second derivatives, which compiled code lacks.
            bound.compiled = {key: made for key, made in bound.compiled.items() if key != id(problem.implicit)}
        if bound.coupled and self._only:
            raise ConfigurationError(
                "newton = 'batch': the derivative of func has entries between samples of the state (its first axis): "
                "must be 'auto' or 'petsc'"
            )

    def _step_by_petsc(self, number: int, time: float, size: float, tape: Tape | None, level: str) -> None:
        if self._bound.guard is not None or tape is not None:
            refusal = methods.gradient_refusal(self.method)
            if refusal is not None:
                raise ConfigurationError(refusal)
        with self._by_petsc_alone() as other:
            other.current.set(self.current.parts)
            other.step(number, time, size, tape, level)
            self.current.set_flat(other.current.flat)

    @contextmanager
    def _by_petsc_alone(self) -> Iterator[ImplicitStepper | IrkStepper]:
        """Bind f to PETSc's stepper within the context. Make that stepper at the first use. Collective then."""
        if self._other is None:
            self._other = self._by_petsc()
        other = self._other
        other.bind(self._bound)
        if not self._other_has_begun:
            other.start_adjoint()
            self._other_has_begun = True
        try:
            yield other
        finally:
            # f may lead to objects that hold the stepper, in a reference cycle through PETSc.
            other.callbacks.bound = None
            self.failed = other.failed


def _configured(
    method: Method, options: PetscOptions, dtype: torch.dtype
) -> tuple[Method, AdditiveTableau | IrkTableau, NewtonTolerances, tuple[float, bool]]:
    """Return the method, its table, the tolerances, and theta with its variant, as PETSc reads them from the options.

    Not collective. Raises `ConfigurationError` for options that PETSc refuses.
    """
    rtol, stol = newton_tolerances(dtype)
    database = PETSc.Options()
    defaults = {"snes_rtol": rtol, "snes_stol": stol}
    given = {name: value for name, value in defaults.items() if not database.hasName(name)} | dict(options)
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
    if method.family != "irk":
        set_type(ts, method)
    unread = read_at_set_up(options)
    set_from_options(ts, given, unread)
    snes = ts.getSNES()
    with options_database(given, unread):
        snes.setFromOptions()
    check_read(unread)
    variant = theta_variant(ts)
    tableau: AdditiveTableau | IrkTableau
    if method.family == "irk":
        tableau = IRK_TABLES[method.name]
    else:
        method = chosen_method(ts, method)
        tableau = theta_tableau(*variant) if method.family == "theta" else petsc_tableau(method)
    relative, absolute, step, iterations = snes.getTolerances()
    ts.destroy()
    return method, tableau, NewtonTolerances(relative, absolute, step, iterations), variant
