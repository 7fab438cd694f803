"""The forward pass of a solve with given steps: outputs, checkpoints and tapes."""

from __future__ import annotations

import time as clock
from collections.abc import Callable

import torch

from pnode_dist.checkpointing.plan import check_plan
from pnode_dist.checkpointing.replay import run_forward
from pnode_dist.ode import safe_points
from pnode_dist.ode.adaptive_pass import adaptive_steps
from pnode_dist.ode.outputs import Outputs
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_plans import divided_for, joined, plans, slots_of
from pnode_dist.ode.steppers.step_rule import call_back
from pnode_dist.petsc import log


def forward_pass(solve: Solve, initial: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Solve from the state `initial`. Collective.

    Returns the outputs of each part of the state, or of each tensor of an observation, `[n, *shape]`. If the only
    output is that at the last time, they have `shape`.
    """
    began = clock.perf_counter()
    solve.release()
    solve.solver.open()
    stepper = solve.solver.stepper
    outputs = _outputs(solve)

    def output(step: int, time: float) -> None:
        if outputs is not None:
            outputs.add(step, time)

    solve.initial = tuple(part.detach() for part in initial)
    solve.bind()
    if solve.guard is not None:
        solve.guard.restart()
    # A solve that ended with an error may have left tensors of inference mode there.
    stepper.current.release()
    stepper.current.set(solve.initial)
    if solve.costs is not None:
        solve.costs.start(solve.times[0], stepper.current.parts)
    if solve.saving.saves(0, 0, len(solve.times) == 1):
        output(0, solve.times[0])
    if len(solve.times) == 1:
        slots_of(solve, 0)
    else:
        with log.stage(log.FORWARD_PASS, solve.logs):
            if solve.grid is None:
                adaptive_steps(solve, output)
            else:
                _given_steps(solve, output)
        solve.update_counts()
        safe_points.after_solve(stepper.comm)
    solve.carried.end_forward()
    if outputs is None:
        found = stepper.current.take()
    else:
        found = outputs.result()
        stepper.current.release()
        if solve.saving.only_last:
            found = tuple(part[0] for part in found)
    solve.unbind()
    solve.has_trajectory = solve.keeps_trajectory
    if solve.took is not None:
        solve.took.seconds += clock.perf_counter() - began
        solve.took.steps += solve.statistics.forward_steps
    if not solve.keeps_trajectory:
        solve.solver.done()
    return found


def _outputs(solve: Solve) -> Outputs | None:
    """Return the store of the outputs, and set the steps that are saved if they are known.

    None if the only output is the last state itself, whose memory is handed over.
    """
    saving, only_time = solve.saving, len(solve.times) == 1
    solve.saved, count = {}, 1 if saving.only_last else None if saving.every else len(solve.times)
    if solve.grid is not None or only_time:
        solve.saved = saving.of_grid(None if only_time else solve.grid)
        count = len(solve.saved)
    if saving.only_last and solve.observing is None and solve.costs is None and solve.consumer is None:
        return None
    stepper = solve.solver.stepper
    return Outputs(stepper.layout, stepper.current, solve.observing, solve.costs, count, solve.consumer)


def _given_steps(solve: Solve, output: Callable[[int, float], None]) -> None:
    """Take the steps of the solve's grid, and keep the checkpoints and tapes of its plan."""
    stepper, grid = solve.solver.stepper, solve.steps
    segments = solve.divided = divided_for(solve)

    def begin(step: int) -> None:
        if step < grid.steps:
            callback = solve.callbacks.step
            call_back(callback, stepper.layout, grid.starts[step], stepper.current.parts, grid.sizes[step])

    def reached(unit: int) -> None:
        step = solve.segments.bounds[unit]
        if step in solve.saved:
            output(step, solve.time_before(step))
        end = solve.time_before(step)
        call_back(solve.callbacks.reached, stepper.layout, end, stepper.current.parts, grid.sizes[step - 1])
        if stepper.monitored:
            last = min(step, grid.steps - 1)
            size = grid.sizes[last]
            stepper.monitor(step, grid.starts[last] + (step - last) * size, size)
        begin(step)

    slots = slots_of(solve, segments.segments)
    stepper.monitor(0, grid.starts[0], grid.sizes[0])
    begin(0)
    if not solve.keeps_trajectory:
        for unit in range(segments.segments):
            solve.advance(unit)
            solve.statistics.forward_steps += solve.count(unit)
            reached(unit + 1)
        return
    fixed = solve.fixed_plan
    if fixed is not None and fixed.disk and solve.solver.disk_is_lost:
        fixed = None  # The plan needs the disk that was lost.
    solve.plan = fixed or plans(solve, slots).chosen
    if fixed is not None:
        check_plan(fixed, grid.steps, slots, segments.longest, segments.segments)
    solve.charge(solve.plan.ram, solve.plan.ram_bytes, solve.plan.disk_bytes)
    solve.solver.has_spilt = solve.solver.has_spilt or solve.plan.disk > 0
    kept = segments.bounds[segments.segments - solve.plan.kept]
    solve.actions = joined(solve, solve.plan).actions()
    run_forward(solve.actions, solve, solve.checkpoints, solve.statistics, reached)
    solve.statistics.graph_steps = grid.steps - kept
    solve.statistics.graph_bytes = solve.statistics.graph_steps * (solve.solver.tape_bytes or 0)
