"""One solve: its forward pass, what it keeps, and its adjoint."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.checkpointing.budget import ScratchError, Slots, agree_on_slots
from pnode_dist.checkpointing.online import OnlineCheckpoints
from pnode_dist.checkpointing.plan import Plan, Plans, best, check_plan, needs_costs
from pnode_dist.checkpointing.replay import run_backward, run_forward
from pnode_dist.checkpointing.schedule import Action, Tier
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import Checkpoints, SpillError
from pnode_dist.checkpointing.store import State as FlatState
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import safe_points
from pnode_dist.ode.call_agreement import Agreed
from pnode_dist.ode.probe import measured_tape, probe
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.recomputation.guard import Guard, tolerance_of
from pnode_dist.ode.recomputation.surroundings import Surroundings
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.tangent import hooks_aside
from pnode_dist.ode.solver import Solver
from pnode_dist.ode.steppers.adaptive import AcceptedStep, AdaptiveStepper, integrate
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.ode.steppers.tolerances import ErrorControl
from pnode_dist.ode.time_grid import TimeGrid, gradient_wrt_times
from pnode_dist.petsc import log


@dataclass
class Solve:
    """One solve: its steps on the shared stepper, its checkpoints and recordings, and what it counted.

    `grid` are its steps: given, or with `control` those that were accepted, once they are known. `parameters` are what
    the gradient is for, where the problem may have copies of another type. With `last_only` the state at the last time
    is all that is asked for. `surroundings` is what f sees besides its arguments, and `on_mismatch` says what follows
    where a recomputed step differs: `raise`, `warn` or `ignore`. `has_trajectory`: a forward pass has laid down what a
    backward pass needs. `outcome` is the fingerprint of the result where torch.utils.checkpoint may recompute it.
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
    last_only: bool = False
    surroundings: Surroundings | None = None
    on_mismatch: str = "raise"
    # What all ranks agreed on before this solve; None on one rank.
    agreed: Agreed | None = None
    has_trajectory: bool = field(default=False, init=False)
    outcome: float | None = field(default=None, init=False)
    plan: Plan | None = None
    actions: Iterator[Action] = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    tapes: dict[int, Tape] = field(default_factory=dict)
    # The first step, taken to measure its recording before there was a plan: the state after it, and the recording.
    first_step: tuple[FlatState, Tape] | None = None
    initial: tuple[torch.Tensor, ...] = ()
    refund: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.carried, self.guard = self.bound.carried, None
        if self.keeps_trajectory and self.on_mismatch != "ignore":
            narrow = self.solver.trajectory.checkpoint_dtype != "float64"
            tolerance = tolerance_of(self.solver.stepper.layout.compute_dtype, narrow)
            self.guard = Guard(self.on_mismatch, tolerance, self.solver.stepper.comm, _weakly(self._reasons))
        self.bound.guard = self.guard
        self.checkpoints = Checkpoints(self.solver.pools, self.solver.checkpoint_bytes, self.statistics, self.carried)
        self.logs = self.bound.logs
        self.ram_slots = 0

    # The steps of the solve, as `trajectory.replay` asks for them

    @property
    def state(self) -> FlatState:
        return self.solver.stepper.current.array

    @property
    def steps(self) -> TimeGrid:
        assert self.grid is not None
        return self.grid

    def time(self, step: int) -> float:
        return self.steps.starts[step]

    def overwrite(self, write: Callable[[FlatState], None]) -> None:
        with log.event(log.CHECKPOINT, self.logs):
            self.solver.stepper.current.overwrite(write)

    def restart(self) -> None:
        self.solver.stepper.current.set(self.initial)
        self.carried.restart()

    def advance(self, step: int, recompute: bool = False) -> None:
        safe_points.between_steps(self.solver.stepper.comm)
        self.solver.stepper.fingerprints = self.guard is not None
        if not self._use_first_step():
            with log.event(log.RECOMPUTE if recompute else log.STEP, self.logs):
                self.solver.stepper.step(step, self.steps.starts[step], self.steps.sizes[step])
        self._stepped(step, recompute)

    def record(self, step: int, recompute: bool = False) -> None:
        safe_points.between_steps(self.solver.stepper.comm)
        # A step that is recorded in the forward pass is not recomputed.
        self.solver.stepper.fingerprints = self.guard is not None and recompute
        tape = self._use_first_step()
        if not tape:
            tape = []
            level = self.solver.trajectory.level if self.plan is None else self.plan.level
            with log.event(log.RECOMPUTE if recompute else log.STEP, self.logs):
                self.solver.stepper.step(
                    step, self.steps.starts[step], self.steps.sizes[step], tape, not recompute, level
                )
        if recompute:
            self._stepped(step, recompute)
        elif step == 0:
            self._first_step_taken()
        self.tapes[step] = tape

    def _stepped(self, step: int, recompute: bool) -> None:
        """Keep the fingerprint of the state after a step, or compare it with the one kept; a step is over."""
        if step == 0 and not recompute:
            self._first_step_taken()
        stepper = self.solver.stepper
        if self.guard is None or stepper.fingerprint is None:
            return
        if recompute:
            self.guard.compare_state(step, self.steps.starts[step], stepper.fingerprint, stepper.current.parts)
        else:
            self.guard.keep(step, stepper.fingerprint)

    def _first_step_taken(self) -> None:
        """Decide whether f carries state, and refuse one that gives another value each time where steps solve with it.

        Collective for implicit methods.
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

    def adjoint(self, step: int) -> None:
        safe_points.between_steps(self.solver.stepper.comm)
        tape = self.tapes.pop(step)
        with log.event(log.ADJOINT_STEP, self.logs):
            self.solver.stepper.adjoint_step(step, self.steps.starts[step], self.steps.sizes[step], tape)
        if self.bound.needs_time_gradient:
            self._size_gradients[step], self._start_gradients[step] = self.solver.stepper.take_time_gradients()

    def _use_first_step(self) -> Tape | None:
        if self.first_step is None:
            return None
        (after, tape), self.first_step = self.first_step, None
        self.overwrite(lambda state: np.copyto(state, after))
        stepper = self.solver.stepper
        stepper.fingerprint = fingerprint(stepper.current.parts)
        return tape

    # Forward

    def forward(self, initial: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Solve from `initial`; each part's outputs, `[len(t), *shape]`, or `shape` with `last_only`. Collective."""
        self.release()
        self.solver.open()
        stepper = self.solver.stepper
        layout = stepper.layout
        outputs = tuple(
            torch.empty((len(self.times), *shape), dtype=layout.dtype, device=layout.device)
            for shape in (() if self.last_only else layout.shapes)
        )

        def output(number: int) -> None:
            if outputs:
                stepper.close_segment()
                for values, part in zip(outputs, stepper.current.parts, strict=True):
                    values[number].copy_(part)

        self.initial = tuple(part.detach() for part in initial)
        self._bind()
        if self.guard is not None:
            self.guard.restart()
        # A solve that ended with an error may have left tensors of inference mode there.
        stepper.current.release()
        stepper.current.set(self.initial)
        output(0)
        if len(self.times) == 1:
            self._slots(0)
        else:
            with log.stage(log.FORWARD_PASS, self.logs):
                if self.grid is None:
                    self._forward_adaptive(output)
                else:
                    self._forward_fixed(output)
            self._count()
            safe_points.after_solve(stepper.comm)
        self.carried.end_forward()
        stepper.close_segment()
        if self.last_only:
            outputs = stepper.current.take()
        else:
            stepper.current.release()
        self._unbind()
        self.has_trajectory = self.keeps_trajectory
        if not self.keeps_trajectory:
            self.solver.done()
        return outputs

    def _bind(self) -> None:
        """Let the stepper, which other solves share, solve this problem."""
        stepper = self.solver.stepper
        stepper.bind(self.bound)
        stepper.fingerprints, stepper.fingerprint = self.guard is not None, None

    def _unbind(self) -> None:
        """Let the stepper hold the problem no longer: what f leads to may hold the stepper, through PETSc's objects."""
        callbacks = self.solver.stepper.callbacks
        if callbacks.bound is self.bound:
            callbacks.bound = None

    def _forward_fixed(self, output: Callable[[int], None]) -> None:
        stepper, grid = self.solver.stepper, self.steps

        def reached(step: int) -> None:
            number = grid.outputs.get(step)
            if number is not None:
                output(number)
            if stepper.monitored:
                last = min(step, grid.steps - 1)
                size = grid.sizes[last]
                stepper.monitor(step, grid.starts[last] + (step - last) * size, size)

        slots = self._slots(grid.steps)
        stepper.monitor(0, grid.starts[0], grid.sizes[0])
        if not self.keeps_trajectory:
            for step in range(grid.steps):
                self.advance(step)
                self.statistics.forward_steps += 1
                reached(step + 1)
            return
        fixed = self.fixed_plan
        if fixed is not None and fixed.disk and self.solver.disk_is_lost:
            fixed = None  # It went with the disk.
        self.plan = fixed or self.plans(slots).chosen
        if fixed is not None:
            check_plan(fixed, grid.steps, slots)
        self._charge(self.plan.ram, self.plan.ram_bytes, self.plan.disk_bytes)
        self.solver.has_spilt = self.solver.has_spilt or self.plan.disk > 0
        self.actions = self.plan.actions()
        run_forward(self.actions, self, self.checkpoints, self.statistics, reached)
        self.statistics.graph_steps = self.plan.kept
        self.statistics.graph_bytes = self.plan.kept * (self.solver.tape_bytes or 0)

    def _forward_adaptive(self, output: Callable[[int], None]) -> None:
        """The forward pass with error control; what it keeps is decided as it goes."""
        assert self.control is not None
        stepper, trajectory = self.solver.stepper, self.solver.trajectory
        slots = self._slots(None)
        adaptive = self.solver.adaptive_stepper(self.control.adaptor)
        starts: list[float] = []
        sizes: list[float] = []
        ends = {0: 0}
        online: OnlineCheckpoints | None = None
        most_tapes = 0
        if self.keeps_trajectory:
            if trajectory.keeps_steps and trajectory.level == "graph":
                most_tapes = self._most_tapes(adaptive, slots)
            self._charge(slots.ram, slots.ram_bytes, slots.disk * slots.checkpoint_bytes)
            online = OnlineCheckpoints(self.checkpoints, slots.ram, slots.disk)
        # Checkpoints are kept beside the graphs, in case that there are more steps than graphs fit.
        tape = most_tapes > 0

        def before(step: int, time: float) -> bool:
            nonlocal tape
            safe_points.between_steps(stepper.comm)
            if tape and step >= most_tapes:
                if trajectory.keep == "graph":
                    raise ConfigurationError(
                        f"trajectory: keep = 'graph': the graphs of the first {step} steps fill ram = "
                        f"{trajectory.ram!r} and there are more: make it larger, or use keep = 'auto'"
                    )
                tape = False
                self.tapes.clear()
            if online is not None:
                with log.event(log.CHECKPOINT, self.logs):
                    online.before(step, time, stepper.current.array)
            return tape

        def after(step: AcceptedStep) -> None:
            starts.append(step.start)
            sizes.append(step.size)
            self.statistics.forward_steps += 1
            if step.number == 0:
                self._first_step_taken()
            if self.guard is not None:
                self.guard.keep(step.number, fingerprint(stepper.current.parts))
            if step.tape is not None:
                self.tapes[step.number] = step.tape
            if step.output is not None:
                ends[len(starts)] = step.output
                output(step.output)
            stepper.monitor(len(starts), step.start + step.size, step.size)

        stepper.monitor(0, self.times[0], self.times[1] - self.times[0])
        with log.event(log.STEP, self.logs):
            self.statistics.rejected_steps += integrate(adaptive, self.times, self.control, before, after, self.carried)
        self.grid = TimeGrid(tuple(starts), tuple(sizes), ends)
        if online is not None:
            self._charge_held(slots)
            self.actions = online.reversal(len(starts), recorded=tape)
            self.statistics.graph_steps = len(self.tapes)
            self.statistics.graph_bytes = len(self.tapes) * (self.solver.tape_bytes or 0)

    def _most_tapes(self, adaptive: AdaptiveStepper, slots: Slots) -> int:
        """How many recorded steps fit beside their checkpoints; the first is the working set. Collective."""
        solver, stepper = self.solver, self.solver.stepper
        if solver.tape_bytes is None:
            assert self.control is not None
            counts = self.bound.counts()
            adaptive.begin(self.control)
            size = adaptive.first_size(self.times[0], self.times[1] - self.times[0])
            size = math.copysign(size, self.times[1] - self.times[0])
            _, solver.tape_bytes = measured_tape(stepper, self.bound, self.times[0], size, "stage graphs")
            stepper.current.set(self.initial)
            self.carried.restart()
            self.bound.count_from(counts)
        return slots.ram_bytes // max(solver.tape_bytes + slots.checkpoint_bytes, 1) + 1

    def _slots(self, steps: int | None) -> Slots:
        """What this solve may hold, as agreed on by all ranks. Collective."""
        solver = self.solver
        try:
            slots = agree_on_slots(
                solver.trajectory,
                solver.checkpoint_bytes,
                steps,
                self.keeps_trajectory,
                solver.stepper.comm,
                solver.disk_is_lost,
                None if self.agreed is None else self.agreed.take_bounds(),
            )
        except ScratchError as error:
            if not solver.has_spilt:
                raise
            # It was there for earlier solves: that is a disk that failed, not a wrong configuration.
            solver.disk_is_lost = self._lost(str(error).removeprefix("trajectory: "))
            return self._slots(steps)
        self.ram_slots = slots.ram
        return slots

    def _charge(self, checkpoints: int, ram: int, disk: int) -> None:
        ledger = self.solver.trajectory.ledger
        ledger.make_room(self.solver.memory, checkpoints)
        self.refund = ledger.charge(ram, disk)

    def measured_plans(self, initial: tuple[torch.Tensor, ...]) -> Plans:
        """The candidates with predicted times, from costs measured now. Collective."""
        self.release()
        self.initial = tuple(part.detach() for part in initial)
        self.keeps_trajectory = True
        if self.agreed is not None:
            self.agreed.bounds = None
        self.solver.costs = None
        self.solver.open()
        self._bind()
        self.solver.stepper.current.set(initial)
        try:
            return self.plans(measure=True)
        finally:
            self.release()

    def _charge_held(self, slots: Slots) -> None:
        """Book what is held now that the number of steps is known, and may be held while they are reversed."""
        most = self.steps.steps - 1
        recorded = len(self.tapes) * (self.solver.tape_bytes or 0)
        assert self.refund is not None
        self.refund()
        size = slots.checkpoint_bytes
        self._charge(min(slots.ram, most), recorded + min(slots.ram, most) * size, min(slots.disk, most) * size)

    def plans(self, slots: Slots | None = None, measure: bool = False) -> Plans:
        """What may be kept, chosen among candidates. The same on all ranks: it follows from figures agreed on.

        With `measure` the costs are measured in any case, else only if the choice depends on them. Collective.
        """
        solver, grid = self.solver, self.steps
        trajectory, stepper = solver.trajectory, solver.stepper
        slots = slots or self._slots(grid.steps)
        if solver.disk_is_lost and trajectory.schedule == "all":
            # What is left of it: as many states as memory holds.
            keep = "solution" if trajectory.keep == "auto" else trajectory.keep
            trajectory = replace(trajectory, schedule="revolve", keep=keep)
        counts = self.bound.counts()
        matters = grid.steps > 1 or trajectory.charges_all_tapes
        if trajectory.keeps_steps and matters and solver.tape_bytes is None:
            tape, solver.tape_bytes = measured_tape(
                stepper, self.bound, grid.starts[0], grid.sizes[0], trajectory.level
            )
            self.first_step = (stepper.current.array.copy(), tape)
            stepper.current.set(self.initial)
        tape_bytes = (solver.tape_bytes or 0) if trajectory.keeps_steps else None
        if not (measure or needs_costs(trajectory, slots, grid.steps, tape_bytes)):
            if trajectory is solver.trajectory:
                return solver.planned(slots, grid.steps, tape_bytes)
            return best(trajectory, slots, grid.steps, tape_bytes, None)
        # Costs of a solve that had no disk say nothing about it.
        if solver.costs is None or (slots.disk and solver.costs.write == 0):
            self.first_step = None
            self.bound.count_from(counts)
            pools = {tier: pool for tier, pool in solver.pools.items() if tier is Tier.RAM or slots.disk}
            solver.costs = probe(stepper, self.bound, self.initial, grid.starts[0], grid.sizes[0], pools)
            self.carried.restart()
        return best(trajectory, slots, grid.steps, tape_bytes, solver.costs)

    # Backward

    def compare_outcome(self, expected: float | None) -> None:
        """Compare the result with that of the forward pass which this solve recomputes, given by its fingerprint.

        Collective. Raises `RecomputationError`, see `Guard`.
        """
        if self.guard is not None and self.outcome is not None and expected is not None:
            self.guard.compare_outcome(expected, self.outcome, self.initial)
            self.guard.finish()

    def _reasons(self) -> list[str]:
        """The known reasons why a recomputed step may differ."""
        found = [] if self.surroundings is None else self.surroundings.reasons()
        if self.carried.active and self.control is not None:
            found.append(
                "it draws random numbers or changes what it reads, also in steps that error control rejects: use steps "
                "of fixed size"
            )
        elif self.carried.draws and not self.carried.active:
            found.append("it draws random numbers, but did not in its first step: the next solve will restore them")
        return found

    def _lost(self, error: str | None) -> bool:
        """Whether some rank lost a checkpoint on disk; warns of it, or raises if that was asked for. Collective."""
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

    def backward(
        self, cotangents: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """The gradient with respect to the initial parts, the parameters and, if asked for, the times, on this rank.

        Collective.
        """
        self.solver.open()
        stepper = self.solver.stepper
        layout = stepper.layout
        steps = 0 if self.grid is None else self.grid.steps
        ends = {0: 0} if self.grid is None else self.grid.outputs
        if self.last_only:
            ends = {steps: 0}
        self._bind()
        stepper.start_adjoint()
        self._size_gradients, self._start_gradients = [0.0] * steps, [0.0] * steps

        def reversed_to(step: int) -> None:
            number = ends.get(step)
            if number is not None:
                stepper.add_to_adjoint(
                    [part if part is None or self.last_only else part[number] for part in cotangents]
                )

        reversed_to(steps)
        if steps > 0:
            with hooks_aside(self.bound.parameters.tensors), log.stage(log.BACKWARD_PASS, self.logs):
                disk_is_lost = run_backward(
                    self.actions, self, self.checkpoints, self.statistics, reversed_to, self._lost, self.ram_slots
                )
            self.solver.disk_is_lost = self.solver.disk_is_lost or disk_is_lost
            if self.guard is not None:
                self.guard.finish()
                self.statistics.largest_mismatch = self.guard.worst
        self._count()
        self.release()
        stepper.current.release()
        safe_points.after_solve(stepper.comm)
        adjoint, gradients = stepper.end_adjoint([parameter.shape for parameter in self.parameters])
        self._unbind()
        self.solver.done()
        states = tuple(part.to(layout.device, layout.dtype) for part in adjoint)
        parameters = tuple(
            gradient
            if parameter.dtype is gradient.dtype and parameter.device == gradient.device
            else gradient.to(parameter.device, parameter.dtype)
            for gradient, parameter in zip(gradients, self.parameters, strict=True)
        )
        if not self.bound.needs_time_gradient:
            return states, parameters, ()
        found = [0.0] * len(self.times)
        if steps > 0:
            found = gradient_wrt_times(self.steps, self.times, self._size_gradients, self._start_gradients)
        return states, parameters, (torch.tensor(found, dtype=self.time_dtype),)

    def release(self) -> None:
        """Give back the checkpoints and their budget, and drop the recordings."""
        self.has_trajectory = False
        self.checkpoints.clear()
        self.tapes.clear()
        self.first_step = None
        if self.refund is not None:
            self.refund()
            self.refund = None

    def abandon(self) -> None:
        """End a solve that raised, or whose graph was dropped. Not collective: other ranks may not come here."""
        self.release()
        self._unbind()
        self.solver.abandon()

    def _count(self) -> None:
        self.statistics.function_evaluations = self.bound.evaluations
        self.statistics.vjps = self.bound.vjps
        self.statistics.jvps = self.bound.jvps
        self.statistics.newton_iterations = self.bound.newton_iterations
        self.statistics.linear_iterations = self.bound.linear_iterations
        self.statistics.adjoint_linear_iterations = self.bound.adjoint_linear_iterations


def _weakly(method: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """`method` without a reference to its object: PETSc holds the problem, and with it what guards it."""
    reference = weakref.WeakMethod(method)

    def called() -> list[str]:
        found = reference()
        return [] if found is None else found()

    return called
