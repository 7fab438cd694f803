"""The plan of a solve: its checkpoint slots, as agreed on by all ranks, and the choice among candidate plans."""

from __future__ import annotations

from dataclasses import replace

import torch

from pnode_dist.checkpointing.budget import CheckpointBudget, ScratchError, Slots, agree_on_slots
from pnode_dist.checkpointing.plan import Plans, best, needs_costs
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.ode.probe import measured_tape, probe
from pnode_dist.ode.solve import Solve
from pnode_dist.petsc import log


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


def plans(solve: Solve, slots: Slots | None = None, measure: bool = False) -> Plans:
    """Choose a plan among the candidates. Collective.

    All ranks choose the same one, because it follows from figures that they agree on. With `measure` the costs are
    always measured, otherwise only if the choice depends on them.
    """
    solver, grid, stepper = solve.solver, solve.steps, solve.solver.stepper
    slots = slots or slots_of(solve, grid.steps)
    budget = _without_disk(solver.trajectory) if solver.disk_is_lost else solver.trajectory
    counts = solve.bound.counts()
    if solver.tape_bytes is None:
        with log.event(log.STEP, solve.logs):
            tape, solver.tape_bytes = measured_tape(stepper, solve.bound, grid.starts[0], grid.sizes[0], budget.level)
        solve.first_step = (stepper.current.array.copy(), tape)
        stepper.current.set(solve.initial)
    if not (measure or needs_costs(budget, slots, grid.steps, solver.tape_bytes)):
        if budget is solver.trajectory:
            return solver.planned(slots, grid.steps, solver.tape_bytes)
        return best(budget, slots, grid.steps, solver.tape_bytes, None)
    # Costs that were measured without a disk do not cover it.
    if solver.costs is None or (slots.disk and solver.costs.write == 0):
        solve.first_step = None
        solve.bound.count_from(counts)
        pools = {tier: pool for tier, pool in solver.pools.items() if tier is Tier.RAM or slots.disk}
        solver.costs = probe(stepper, solve.bound, solve.initial, grid.starts[0], grid.sizes[0], pools)
        solve.carried.restart()
    return best(budget, slots, grid.steps, solver.costs.levels[budget.level].bytes, solver.costs)


def _without_disk(budget: CheckpointBudget) -> CheckpointBudget:
    """Return the budget after the loss of the disk: `schedule = "all"` becomes as many states as memory holds."""
    if budget.schedule != "all":
        return budget
    return replace(budget, schedule="revolve", keep="solution" if budget.keep == "auto" else budget.keep)
