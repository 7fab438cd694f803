"""The plan of a solve: its checkpoint slots, as agreed on by all ranks, and the choice among candidate plans."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.checkpointing.budget import CheckpointBudget, ScratchError, Slots, agree_on_slots
from pnode_dist.checkpointing.plan import Plan, Plans, best, needs_costs
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.ode.probe import measured_tape, probe
from pnode_dist.ode.rhs.between import function_of
from pnode_dist.ode.segments import SegmentGrid, divided_into_segments
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.steppers.batched import BatchedStepper
from pnode_dist.ode.steppers.compiled_segment import CompiledSegments
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.traced_explicit import traced_explicit
from pnode_dist.ode.steppers.traced_implicit import traced_implicit
from pnode_dist.petsc import log

_MOST_JOINED, _JOINED_BYTES = 8, 2**25


def slots_of(solve: Solve, steps: int | None) -> Slots:
    """Agree with all ranks on the checkpoint slots of this solve. Collective.

    `steps` is None if their number is not known beforehand.
    """
    solver = solve.solver
    try:
        slots = agree_on_slots(
            solver.trajectory,
            solver.checkpoint_bytes,
            steps,
            solve.keeps_trajectory,
            solver.stepper.comm,
            solver.disk_is_lost,
            None if solve.agreed is None else solve.agreed.take_bounds(),
        )
    except ScratchError as error:
        if not solver.has_spilt:
            raise
        # The directory worked for earlier solves, so the disk has failed; the configuration is not wrong.
        solver.disk_is_lost = solve.checkpoint_was_lost(str(error).removeprefix("trajectory: "))
        return slots_of(solve, steps)
    solve.ram_slots = slots.ram
    return slots


def measured_plans(solve: Solve, initial: tuple[torch.Tensor, ...]) -> Plans:
    """Return all candidate plans with predicted times, from costs that are measured now. Collective."""
    solve.release()
    solve.initial = tuple(part.detach() for part in initial)
    solve.keeps_trajectory = True
    if solve.agreed is not None:
        solve.agreed.bounds = None
    solve.solver.costs = None
    solve.solver.open()
    solve.bind()
    solve.solver.stepper.current.set(initial)
    try:
        return plans(solve, measure=True)
    finally:
        solve.release()


def compile_steps(solve: Solve, initial: tuple[torch.Tensor, ...]) -> None:
    """Compile the steps of a solve from `initial`, with and without a tape, if they can be compiled. Collective."""
    solve.solver.open()
    solve.bind()
    stepper = solve.solver.stepper
    stepper.current.set(initial)
    try:
        if solve.grid is not None and solve.grid.steps:
            segments = divided_for(solve)
            if solve.compiled is not None:
                with solve.carried.aside():
                    stepper.advance(segments[0])
        elif solve.control is not None:
            compile_attempts(solve)
    finally:
        solve.release()
        stepper.current.release()
        solve.unbind()
        solve.solver.done()


def plans(solve: Solve, slots: Slots | None = None, measure: bool = False) -> Plans:
    """Choose a plan among the candidates. Collective.

    All ranks choose the same one, because it follows from figures that they agree on. With `measure` the costs are
    always measured, otherwise only if the choice depends on them.
    """
    solver, stepper = solve.solver, solve.solver.stepper
    if solve.divided is None:
        solve.divided = divided_for(solve)
    units, first = solve.divided.segments, solve.divided[0]
    slots = slots or slots_of(solve, units)
    budget = _without_disk(solver.trajectory) if solver.disk_is_lost else solver.trajectory
    counts = solve.bound.counts()
    steps, segment = solve.steps.steps, solve.divided.longest
    if solver.tape_bytes is None:
        if isinstance(stepper, BatchedStepper) and solve.compiled is not None:
            # Compiled here, because torch.func cannot be traced while saved tensors are counted.
            stepper.record(first, budget.level)
            stepper.current.set(solve.initial)
            solve.bound.count_from(counts)
            solve.carried.restart()
        with log.event(log.STEP, solve.logs):
            tape, nbytes = measured_tape(stepper, solve.bound, first, budget.level, solve.between)
        solver.tape_bytes = -(-nbytes // len(first))
        solve.first_step = (stepper.current.array.copy(), tape)
        stepper.current.set(solve.initial)
    tape_bytes = solver.tape_bytes + solve.observed_bytes
    if not (measure or needs_costs(budget, slots, steps, tape_bytes, segment, units)):
        if budget is solver.trajectory:
            return solver.planned(slots, steps, tape_bytes, segment, units)
        return best(budget, slots, steps, tape_bytes, None, segment, units)
    # Costs that were measured without a disk do not cover it.
    if solver.costs is None or (slots.disk and solver.costs.write == 0):
        solve.first_step = None
        solve.bound.count_from(counts)
        pools = {tier: pool for tier, pool in solver.pools.items() if tier is Tier.RAM or slots.disk}
        solver.costs = probe(stepper, solve.bound, solve.initial, first, pools, solve.between)
        solve.carried.restart()
    tape_bytes = solver.costs.levels[budget.level].bytes + solve.observed_bytes
    return best(budget, slots, steps, tape_bytes, solver.costs, segment, units)


def divided_for(solve: Solve) -> SegmentGrid:
    """Return the segments of a solve, see `steps_per_segment`. Compiled ones leave out the steps next to jumps."""
    most, grid = steps_per_segment(solve), solve.steps
    beside = {step + side for step in grid.jumps for side in (-1, 1)} & set(range(grid.steps)) if most > 1 else ()
    return divided_into_segments(grid, most, {*beside, *solve.saved})


def steps_per_segment(solve: Solve) -> int:
    """Return the largest number of steps of a segment. Compiles the segments of the solve where that is possible.

    Monitors and callbacks see the state after each step, so that segments have one step then.
    """
    most = _compile(solve, solve.steps.starts[0], solve.steps.sizes[0], attempts=False)
    sees_steps = solve.solver.stepper.monitored or solve.callbacks.see_steps
    return 1 if sees_steps else most


def compile_attempts(solve: Solve) -> None:
    """Compile the attempts of a solve with error control, where that is possible. Collective."""
    start = solve.times[0]
    _compile(solve, start, 1e-3 * (solve.times[1] - start), attempts=True)


def _compile(solve: Solve, start: float, size: float, attempts: bool) -> int:
    """Compile steps from `start` by `size`. Returns the largest number of steps of a segment, 1 if not compiled."""
    stepper, compiler = solve.solver.stepper, solve.compiler
    if compiler is None or not isinstance(stepper, ExplicitStepper | BatchedStepper):
        return 1
    layout, func, records, comm = stepper.layout, solve.bound.func, solve.keeps_trajectory, stepper.comm
    between = solve.bound.between
    if isinstance(stepper, ExplicitStepper):
        scheme: Any = stepper.scheme
        state = stepper.current.parts
        make = partial(traced_explicit, func, layout, scheme, records, attempts, between)
        longest = None
    else:
        scheme = stepper.to_compile()
        if scheme is None:
            return 1
        state, make = (stepper.joined_state,), partial(traced_implicit, scheme, *stepper.limits_and_mass)
        # A segment holds the states of the stages of all of its steps. The map between steps comes after a segment.
        longest = max(_JOINED_BYTES // max(scheme.solved_stages * state[0].nbytes, 1), 1) if between is None else 1
    # In another mode, such as that of training, f may do what cannot be compiled.
    functions = (func, *(() if between is None else (function_of(between),)))
    modes = tuple(module.training for one in functions if isinstance(one, nn.Module) for module in one.modules())
    compiled = compiler.once(
        (*map(id, functions), modes, layout, scheme, comm.size > 1, records, attempts),
        functions,
        lambda: CompiledSegments(compiler, make(), layout.device, records, attempts),
    )
    is_empty = longest is not None and not state[0].numel()
    if comm.allreduce(compiled is None or is_empty, MPI.LOR) or compiled is None:
        return 1
    most = compiled.prepare(comm, solve.bound, state, start, size)
    if not most:
        return 1
    solve.compiled = compiled
    stepper.use_compiled(compiled)
    return most if longest is None else min(most, comm.allreduce(longest, MPI.MIN))


def joined(solve: Solve, plan: Plan) -> Plan:
    """Return the plan with longer segments, and divide the solve into these, if it keeps the graph of every step.

    Several steps are recorded as one graph then, which takes less time and the same memory. The gradient has the same
    bits.
    """
    stepper = solve.solver.stepper
    if not (isinstance(stepper, ExplicitStepper) and stepper.joins and solve.compiled is None):
        return plan
    most = min(_MOST_JOINED, _JOINED_BYTES // max(solve.solver.tape_bytes or 0, 1))
    sees_steps = stepper.monitored or solve.callbacks.see_steps
    if plan.kept < plan.units or plan.level != "graph" or sees_steps or most < 2:
        return plan
    # A first step that has a tape already is a segment of its own.
    solve.divided = divided_into_segments(
        solve.steps, most, (*solve.saved, *(() if solve.first_step is None else (1,)))
    )
    units = solve.divided.segments
    return replace(plan, segment=solve.divided.longest, units=units, kept=units)


def _without_disk(budget: CheckpointBudget) -> CheckpointBudget:
    """Return the budget after the loss of the disk: `schedule = "all"` becomes as many states as memory holds."""
    if budget.schedule != "all":
        return budget
    return replace(budget, schedule="revolve", keep="solution" if budget.keep == "auto" else budget.keep)
