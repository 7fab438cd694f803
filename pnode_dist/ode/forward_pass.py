"""The forward pass of a solve with given steps: outputs, checkpoints and tapes."""

from __future__ import annotations

import time as clock
from collections.abc import Callable

import torch

from pnode_dist.checkpointing.plan import check_plan
from pnode_dist.checkpointing.replay import run_forward
from pnode_dist.ode import safe_points
from pnode_dist.ode.adaptive_pass import adaptive_steps
from pnode_dist.ode.segments import divided_into_segments
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_plans import joined, plans, slots_of, steps_per_segment
from pnode_dist.ode.steppers.step_rule import call_back
from pnode_dist.petsc import log


def forward_pass(solve: Solve, initial: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Solve from the state `initial`. Collective.

    Returns the outputs of each part of the state, `[len(t), *shape]`, or its last state, `shape`, with `last_only`.
    """
    began = clock.perf_counter()
    solve.release()
    solve.solver.open()
    stepper = solve.solver.stepper
    layout = stepper.layout
    outputs = tuple(
        torch.empty((len(solve.times), *shape), dtype=layout.dtype, device=layout.device)
        for shape in (() if solve.last_only else layout.shapes)
    )

    def output(number: int) -> None:
        if outputs:
            for values, part in zip(outputs, stepper.current.parts, strict=True):
                values[number].copy_(part)

    solve.initial = tuple(part.detach() for part in initial)
    solve.bind()
    if solve.guard is not None:
        solve.guard.restart()
    # A solve that ended with an error may have left tensors of inference mode there.
    stepper.current.release()
    stepper.current.set(solve.initial)
    output(0)
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
    if solve.last_only:
        outputs = stepper.current.take()
    else:
        stepper.current.release()
    solve.unbind()
    solve.has_trajectory = solve.keeps_trajectory
    if solve.took is not None:
        solve.took.seconds += clock.perf_counter() - began
        solve.took.steps += solve.statistics.forward_steps
    if not solve.keeps_trajectory:
        solve.solver.done()
    return outputs


def _given_steps(solve: Solve, output: Callable[[int], None]) -> None:
    """Take the steps of the solve's grid, and keep the checkpoints and tapes of its plan."""
    stepper, grid = solve.solver.stepper, solve.steps
    segments = solve.divided = divided_into_segments(grid, steps_per_segment(solve))

    def begin(step: int) -> None:
        if step < grid.steps:
            callback = solve.callbacks.step
            call_back(callback, stepper.layout, grid.starts[step], stepper.current.parts, grid.sizes[step])

    def reached(unit: int) -> None:
        number = solve.segments.outputs.get(unit)
        if number is not None:
            output(number)
        step = solve.segments.bounds[unit]
        end = solve.times[-1] if step == grid.steps else grid.starts[step]
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
