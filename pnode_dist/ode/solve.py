"""One solve: its settings, its steps on a shared stepper, and the checkpoints and tapes that it holds.

`pnode_dist.ode.forward_pass` and `pnode_dist.ode.backward_pass` run its two passes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.checkpointing.plan import Plan
from pnode_dist.checkpointing.schedule import Action
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import Checkpoints, SpillError
from pnode_dist.checkpointing.store import State as FlatState
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import safe_points
from pnode_dist.ode.between_steps import BetweenSteps, take, take_with_tape
from pnode_dist.ode.call_agreement import Agreed
from pnode_dist.ode.observing import Observing
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.recomputation.guard import Guard, tolerance_of
from pnode_dist.ode.recomputation.surroundings import Surroundings
from pnode_dist.ode.rhs.automatic_compilation import Times
from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.rhs.observed import OfParts
from pnode_dist.ode.saving import AT_TIMES, Saving
from pnode_dist.ode.segments import Segment, SegmentGrid
from pnode_dist.ode.solver import Solver
from pnode_dist.ode.step_costs import StepCosts, StepEnds
from pnode_dist.ode.steppers.batched import BatchedStepper
from pnode_dist.ode.steppers.compiled_segment import CompiledSegments
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.implicit import ImplicitStepper
from pnode_dist.ode.steppers.step_rule import NO_CALLBACKS, StepCallbacks
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.ode.steppers.tolerances import ErrorControl
from pnode_dist.ode.time_grid import TimeGrid
from pnode_dist.petsc import log


@dataclass
class Solve:
    """One solve on a shared stepper, with its checkpoints, tapes and counters. Implements `replay.Steps`.

    `grid` holds the steps: given beforehand, or with `control` set to the accepted ones after the forward pass.
    `parameters` are the tensors that the gradient is taken with respect to; `bound` may use copies of another type.
    `saving` is the choice of outputs, and `saved[n]` the number of the output that is the state before step n.
    `observing` observes these states, None if they are returned themselves, and `consumer` takes the outputs while the
    solve goes on. `surroundings` holds f's inputs besides its
    arguments. `on_mismatch` is the action if a recomputed step differs: `raise`, `warn` or `ignore`.
    `jumps` are times at which f jumps: with `control` steps end there, and `grid` has them otherwise.
    `agreed` is the agreement of all ranks on this solve, None on one rank. `callbacks` are called at each step.
    `has_trajectory`: a forward pass has stored everything that a backward pass needs.
    `outcome` is the fingerprint of the result, set if torch.utils.checkpoint may recompute this solve.
    `took` are the times to which the solve adds its own, None if nobody compares them.
    `first_step` is a first step taken before there was a plan, to measure its tape: the state after it, and the tape.
    `size_gradients` and `start_gradients` are the gradient with respect to the size and the start of each step.
    """

    solver: Solver
    times: tuple[float, ...]
    grid: TimeGrid | None
    control: ErrorControl | None
    bound: BoundFunction
    parameters: tuple[torch.Tensor, ...]
    statistics: SolveStatistics
    keeps_trajectory: bool
    fixed_plan: Plan | None = None
    time_dtype: torch.dtype = torch.float64
    saving: Saving = AT_TIMES
    observe: OfParts | None = None
    cost: Callable[..., Parts] | None = None
    consumer: Callable[[float, Parts], None] | None = None
    surroundings: Surroundings | None = None
    on_mismatch: str = "raise"
    agreed: Agreed | None = None
    callbacks: StepCallbacks = NO_CALLBACKS
    jumps: tuple[float, ...] = ()
    compiler: Compiler | None = None
    took: Times | None = None
    has_trajectory: bool = field(default=False, init=False)
    outcome: float | None = field(default=None, init=False)
    plan: Plan | None = None
    actions: Iterator[Action] = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    tapes: dict[int, Tape] = field(default_factory=dict)
    saved: dict[int, int] = field(default_factory=dict, init=False)
    observing: Observing | None = field(default=None, init=False)
    costs: StepCosts | None = field(default=None, init=False)
    between: BetweenSteps | None = field(default=None, init=False)
    first_step: tuple[FlatState, Tape] | None = None
    initial: tuple[torch.Tensor, ...] = ()
    divided: SegmentGrid | None = None
    compiled: CompiledSegments | None = None
    refund: Callable[[], None] | None = None
    size_gradients: list[float] = field(default_factory=list, init=False)
    start_gradients: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.carried, self.guard = self.bound.carried, None
        if self.keeps_trajectory and self.on_mismatch != "ignore":
            layout = self.solver.stepper.layout
            kept = getattr(torch, self.solver.trajectory.checkpoint_dtype)
            tolerance = tolerance_of(layout.compute_dtype, layout.state_dtype, kept)
            self.guard = Guard(self.on_mismatch, tolerance, self.solver.stepper.comm, _weakly(self._reasons))
        self.bound.guard = self.guard
        if self.observe is not None:
            stepper = self.solver.stepper
            self.observing = Observing(self.observe, self.bound, stepper.layout, stepper.comm.size)
        if self.bound.between is not None:
            self.between = BetweenSteps(self.bound, keeps_unmapped=self.cost is not None)
        if self.cost is not None:
            stepper = self.solver.stepper
            assert isinstance(stepper, ImplicitStepper | BatchedStepper)
            self.costs = StepCosts(self.cost, self.bound, stepper.layout, stepper.comm.size, *stepper.theta_variant)
        self.checkpoints = Checkpoints(self.solver.pools, self.solver.checkpoint_bytes, self.statistics, self.carried)
        self.logs = self.bound.logs
        self.ram_slots = 0

    # Methods of `replay.Steps`

    @property
    def state(self) -> FlatState:
        return self.solver.stepper.current.array

    @property
    def steps(self) -> TimeGrid:
        assert self.grid is not None
        return self.grid

    @property
    def segments(self) -> SegmentGrid:
        assert self.divided is not None
        return self.divided

    def time(self, unit: int) -> float:
        return self.segments.start(unit)

    def time_before(self, step: int) -> float:
        """Return the time of the state before `step`."""
        return self.steps.starts[step] if step < self.steps.steps else self.times[-1]

    def count(self, unit: int) -> int:
        first, last = self.segments.bounds[unit : unit + 2]
        return last - first

    def overwrite(self, write: Callable[[FlatState], None]) -> None:
        with log.event(log.CHECKPOINT, self.logs):
            self.solver.stepper.current.overwrite(write)

    def restart(self) -> None:
        self.solver.stepper.current.set(self.initial)
        self.carried.restart()

    def advance(self, unit: int, recompute: bool = False) -> None:
        safe_points.between_steps(self.solver.stepper.comm)
        self.solver.stepper.fingerprints = self.guard is not None
        self._enter(unit)
        before = None if self.costs is None or recompute else self.solver.stepper.current.kept()
        if not self._use_first_step():
            with log.event(log.RECOMPUTE if recompute else log.STEP, self.logs):
                take(self.solver.stepper, self.segments[unit], self.between)
        if before is not None:
            self.add_costs(self.segments[unit], before)
        self._stepped(unit, recompute)

    def record(self, unit: int, recompute: bool = False) -> None:
        safe_points.between_steps(self.solver.stepper.comm)
        # A step whose tape is kept from the forward pass is never recomputed: it needs no fingerprint.
        self.solver.stepper.fingerprints = self.guard is not None and recompute
        self._enter(unit)
        before = None if self.costs is None else self.solver.stepper.current.kept()
        tape = self._use_first_step()
        if not tape:
            level = self.solver.trajectory.level if self.plan is None else self.plan.level
            with log.event(log.RECOMPUTE if recompute else log.STEP, self.logs):
                tape = take_with_tape(self.solver.stepper, self.segments[unit], level, self.between)
        if recompute:
            self._stepped(unit, recompute)
        elif unit == 0:
            self.first_step_taken()
        self.tapes[unit] = tape
        self.keep_for_observation(self.segments.bounds[unit + 1])
        if before is not None:
            self.add_costs(self.segments[unit], before, keeps=True, recompute=recompute)

    def add_costs(self, segment: Segment, before: Parts, keeps: bool = False, recompute: bool = False) -> None:
        """Add the running cost of the step that led to the current state. With `keeps`, keep its ends as well."""
        costs = self.costs
        assert costs is not None
        (time,), (size,) = segment.starts, segment.sizes
        after = self.solver.stepper.current.kept() if self.between is None else self.between.unmapped
        ends = StepEnds(time, size, before, after)
        if not recompute:
            costs.add(segment.first, ends)
        if keeps:
            costs.keep(segment.first, ends)

    def keep_for_observation(self, step: int) -> None:
        """Keep the current state, before `step`, if the backward pass observes it again."""
        if self.observing is not None and step in self.saved:
            self.observing.keep(step, self.time_before(step), self.solver.stepper.current.kept())

    def _stepped(self, unit: int, recompute: bool) -> None:
        """Store the fingerprint of the state after a segment, or compare it if the segment was recomputed."""
        if unit == 0 and not recompute:
            self.first_step_taken()
        stepper = self.solver.stepper
        if self.guard is None or stepper.fingerprint is None:
            return
        if recompute:
            first, time = self.segments.bounds[unit], self.segments.start(unit)
            self.guard.compare_state(unit, first, time, stepper.fingerprint, stepper.current.parts)
        else:
            self.guard.keep(unit, stepper.fingerprint)

    def first_step_taken(self) -> None:
        """Decide whether f carries state from one evaluation to the next.

        Collective for implicit methods. Raises `ConfigurationError` if an implicit method has to solve equations with
        an f whose value differs each time.
        """
        self.carried.settle()
        stepper, bound = self.solver.stepper, self.bound
        if not (self.keeps_trajectory and stepper.method.implicit):
            return
        if not stepper.comm.allreduce(self.carried.active, MPI.LOR):
            return
        counts, layout = bound.counts(), stepper.layout
        inputs = layout.inputs(stepper.current.parts)
        with self.carried.aside():
            first, second = (fingerprint(bound.value(bound.func, layout, self.times[0], inputs)) for _ in range(2))
        bound.count_from(counts)
        if stepper.comm.allreduce(first != second, MPI.LOR):
            raise ConfigurationError(
                f"func has another value each time it is evaluated, and method = {stepper.method.name!r} evaluates it "
                "several times in a step: draw random numbers before the solve, or use an explicit method"
            )

    def adjoint(self, unit: int) -> None:
        safe_points.between_steps(self.solver.stepper.comm)
        segment, tape = self.segments[unit], self.tapes.pop(unit)
        self.pull_back_observation(segment.first + len(segment))
        self._enter(unit)
        stepper, costs = self.solver.stepper, None if self.costs is None else self.costs.pull_back(segment.first)
        if self.between is not None:
            self.between.pull_back(stepper, segment, tape)
        if costs is not None:
            stepper.add_to_adjoint(costs.after)
        with log.event(log.ADJOINT_STEP, self.logs):
            found = stepper.pull_back(segment, tape)
        for step, (by_size, by_start) in enumerate(found, start=segment.first):
            self.size_gradients[step], self.start_gradients[step] = by_size, by_start
        if costs is not None:
            stepper.add_to_adjoint(costs.before)
            if found:
                self.size_gradients[segment.first] += costs.by_size
                self.start_gradients[segment.first] += costs.by_start

    @property
    def observed_bytes(self) -> int:
        """The bytes of the states that are kept for observations and costs beside the tape of a step."""
        layout = self.solver.stepper.layout
        shared = isinstance(self.solver.stepper, ExplicitStepper) and not layout.converts
        nbytes = layout.size * layout.state_dtype.itemsize
        return (0 if self.observing is None or shared else nbytes) + (0 if self.costs is None else 2 * nbytes)

    def pull_back_observation(self, step: int) -> None:
        """Add the cotangents of the observation of the state before `step` to the adjoint. Collective if it is."""
        if self.observing is None:
            return
        found = self.observing.pull_back(step, self.saved.get(step), self.saving.only_last)
        if found is not None:
            self.solver.stepper.add_to_adjoint(found)

    def _enter(self, unit: int) -> None:
        """Evaluate f between the jumps before and after a segment."""
        self.bound.smooth_interval = self.steps.smooth_interval(self.segments.bounds[unit])

    def _use_first_step(self) -> Tape | None:
        if self.first_step is None:
            return None
        (after, tape), self.first_step = self.first_step, None
        self.overwrite(lambda state: np.copyto(state, after))
        stepper = self.solver.stepper
        stepper.fingerprint = fingerprint(stepper.current.parts)
        return tape

    def bind(self) -> None:
        """Bind the right-hand side to the stepper, which other solves share."""
        stepper = self.solver.stepper
        stepper.bind(self.bound)
        self.bound.smooth_interval = None if self.grid is None or not self.grid.steps else self.grid.smooth_interval(0)
        stepper.fingerprints, stepper.fingerprint = self.guard is not None, None
        if isinstance(stepper, ExplicitStepper):
            stepper.compiled = self.compiled

    def unbind(self) -> None:
        """Unbind the right-hand side: f may lead to PETSc objects that hold the stepper, in a reference cycle."""
        callbacks = self.solver.stepper.callbacks
        if callbacks.bound is self.bound:
            callbacks.bound = None

    def charge(self, checkpoints: int, ram: int, disk: int) -> None:
        """Charge the budget with this solve's checkpoints and tapes, in bytes. `release` refunds them."""
        ledger = self.solver.trajectory.ledger
        ledger.make_room(self.solver.memory, checkpoints)
        self.refund = ledger.charge(ram, disk)

    def compare_outcome(self, expected: float | None) -> None:
        """Compare the result with the fingerprint of the solve that this one recomputes. Collective.

        Raises `RecomputationError`, see `Guard`.
        """
        if self.guard is not None and self.outcome is not None and expected is not None:
            self.guard.compare_outcome(expected, self.outcome, self.initial)
            self.guard.finish()

    def _reasons(self) -> list[str]:
        """Return the known reasons why a recomputed step may differ."""
        found = [] if self.surroundings is None else self.surroundings.reasons()
        if self.carried.active and self.control is not None:
            found.append(
                "it draws random numbers or changes what it reads, also in steps that error control rejects: use steps "
                "of fixed size"
            )
        elif self.carried.draws and not self.carried.active:
            found.append("it draws random numbers, but did not in its first step: the next solve will restore them")
        return found

    def checkpoint_was_lost(self, error: str | None) -> bool:
        """Return True if any rank lost a checkpoint on disk; `error` is this rank's error. Collective.

        Warns, or raises `SpillError` on all ranks with `on_spill_error = "raise"`.
        """
        comm = self.solver.stepper.comm
        if not comm.allreduce(error is not None, MPI.LOR):
            return False
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(comm.allgather(error)) if text is not None]
        if self.solver.trajectory.on_spill_error == "raise":
            raise SpillError(f"trajectory: {errors[0]}")
        if comm.rank == 0:
            warnings.warn(
                f"trajectory: {errors[0]}; going on without checkpoints on disk", RuntimeWarning, stacklevel=2
            )
        return True

    def release(self) -> None:
        """Free the checkpoints and tapes, and refund the budget."""
        self.has_trajectory = False
        self.checkpoints.clear()
        self.tapes.clear()
        self.first_step = None
        if self.observing is not None:
            self.observing.states.clear()
        if self.costs is not None:
            self.costs.ends.clear()
        if self.between is not None:
            self.between.unmapped = ()
        if self.refund is not None:
            self.refund()
            self.refund = None

    def abandon(self) -> None:
        """End a solve that raised, or whose graph was dropped. Not collective: other ranks may go on."""
        self.release()
        self.unbind()
        self.solver.abandon()

    def update_counts(self) -> None:
        """Copy the counters of the right-hand side into the statistics."""
        self.statistics.function_evaluations = self.bound.evaluations
        self.statistics.vjps = self.bound.vjps
        self.statistics.jvps = self.bound.jvps
        self.statistics.newton_iterations = self.bound.newton_iterations
        self.statistics.linear_iterations = self.bound.linear_iterations
        self.statistics.adjoint_linear_iterations = self.bound.adjoint_linear_iterations


def _weakly(method: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Wrap `method` without a reference to its object, because PETSc holds the right-hand side and its guard."""
    reference = weakref.WeakMethod(method)

    def called() -> list[str]:
        found = reference()
        return [] if found is None else found()

    return called
