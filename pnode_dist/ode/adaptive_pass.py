"""The forward pass of a solve with error control, whose number of steps is not known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable

from pnode_dist.checkpointing.budget import Slots
from pnode_dist.checkpointing.online import OnlineCheckpoints
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import safe_points
from pnode_dist.ode.jumps import SmoothInterval
from pnode_dist.ode.probe import measured_tape
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.segments import Segment, divided_into_segments
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_plans import compile_attempts, slots_of
from pnode_dist.ode.steppers.adaptive import AcceptedStep, AdaptiveStepper, integrate
from pnode_dist.ode.steppers.step_rule import call_back
from pnode_dist.ode.time_grid import TimeGrid, stops_of
from pnode_dist.petsc import log


def adaptive_steps(solve: Solve, output: Callable[[int, float], None]) -> None:
    """Take steps with error control, and set the solve's grid to those that were accepted. Collective.

    Keep the tapes of all steps as long as they fit, and checkpoints beside them. If there are more steps than tapes
    fit, drop the tapes. `output(step, time)` stores the current state, the one before `step`, as an output.
    """
    assert solve.control is not None
    stepper, budget = solve.solver.stepper, solve.solver.trajectory
    slots = slots_of(solve, None)
    adaptive = solve.solver.adaptive_stepper(solve.control)
    compile_attempts(solve)
    starts: list[float] = []
    sizes: list[float] = []
    stops = stops_of(solve.times, solve.jumps)
    ends = {0: 0}
    last = len(solve.times) - 1
    solve.saved = {0: 0} if solve.saving.saves(0, 0, False) else {}
    jumps = {0: stops[0].time} if stops[0].is_jump else {}
    online: OnlineCheckpoints | None = None
    most_tapes = 0

    def enter(interval: SmoothInterval | None) -> None:
        solve.bound.smooth_interval = interval

    enter(stops[0].after)
    if solve.keeps_trajectory:
        if budget.keeps_steps and budget.level == "graph":
            most_tapes = _most_tapes(solve, adaptive, slots)
        solve.charge(slots.ram, slots.ram_bytes, slots.disk * slots.checkpoint_bytes)
        online = OnlineCheckpoints(solve.checkpoints, slots.ram, slots.disk)
    keeps_tapes = most_tapes > 0

    start: Parts = ()

    def before(step: int, time: float) -> bool:
        nonlocal keeps_tapes, start
        if solve.costs is not None:
            start = stepper.current.kept()
        safe_points.between_steps(stepper.comm)
        if keeps_tapes and step >= most_tapes:
            if budget.keep == "graph":
                raise ConfigurationError(
                    f"trajectory: keep = 'graph': the graphs of the first {step} steps fill ram = "
                    f"{budget.ram!r} and there are more: make it larger, or use keep = 'auto'"
                )
            keeps_tapes = False
            solve.tapes.clear()
        if online is not None:
            with log.event(log.CHECKPOINT, solve.logs):
                online.before(step, time, stepper.current.array)
        return keeps_tapes

    def after(step: AcceptedStep) -> None:
        starts.append(step.start)
        sizes.append(step.size)
        solve.statistics.forward_steps += 1
        end = step.start + step.size if step.stop is None else step.stop.time
        if solve.between is not None:
            segment, unmapped = Segment(step.number, (step.start,), (step.size,), end), stepper.current.kept()
            if step.tape is None:
                solve.between.advance(stepper, segment)
            else:
                step.tape.append(solve.between.record(stepper, segment, budget.level))
            adaptive.state_changed(unmapped)
        if step.number == 0:
            solve.first_step_taken()
        if solve.guard is not None:
            solve.guard.keep(step.number, fingerprint(stepper.current.parts))
        if step.tape is not None:
            solve.tapes[step.number] = step.tape
        if solve.costs is not None:
            solve.add_costs(Segment(step.number, (step.start,), (step.size,)), start, keeps=step.tape is not None)
        if step.stop is not None and step.stop.is_jump:
            jumps[len(starts)] = step.stop.time
        output_number = None if step.stop is None else step.stop.output
        if output_number is not None:
            ends[len(starts)] = output_number
        if solve.saving.saves(len(starts), output_number, output_number == last):
            solve.saved[len(starts)] = len(solve.saved)
            output(len(starts), end)
            if step.tape is not None and solve.observing is not None:
                solve.observing.keep(len(starts), end, stepper.current.kept())
        call_back(solve.callbacks.reached, stepper.layout, end, stepper.current.parts, step.size)
        stepper.monitor(len(starts), step.start + step.size, step.size)

    stepper.monitor(0, solve.times[0], solve.times[1] - solve.times[0])
    with log.event(log.STEP, solve.logs):
        solve.statistics.rejected_steps += integrate(
            adaptive, stops, solve.control, before, after, solve.carried, enter
        )
    solve.grid = TimeGrid(tuple(starts), tuple(sizes), ends, jumps, solve.times[-1])
    solve.divided = divided_into_segments(solve.grid, 1)
    if online is not None:
        solve.actions = online.reversal(len(starts), recorded=keeps_tapes)
        _charge_for_held(solve, slots)
        solve.statistics.graph_steps = len(solve.tapes)
        solve.statistics.graph_bytes = len(solve.tapes) * (solve.solver.tape_bytes or 0)


def _most_tapes(solve: Solve, adaptive: AdaptiveStepper, slots: Slots) -> int:
    """Return the number of tapes that fit into memory, with a checkpoint for each but the first. Collective."""
    solver, stepper = solve.solver, solve.solver.stepper
    if solver.tape_bytes is None:
        assert solve.control is not None
        counts = solve.bound.counts()
        adaptive.begin(solve.control)
        span = solve.times[1] - solve.times[0]
        size = math.copysign(adaptive.first_size(solve.times[0], span), span)
        _, solver.tape_bytes = measured_tape(
            stepper, solve.bound, Segment(0, (solve.times[0],), (size,)), "graph", solve.between
        )
        stepper.current.set(solve.initial)
        solve.carried.restart()
        solve.bound.count_from(counts)
    nbytes = solver.tape_bytes + solve.observed_bytes + slots.checkpoint_bytes
    return (slots.ram_bytes + slots.checkpoint_bytes) // max(nbytes, 1)


def _charge_for_held(solve: Solve, slots: Slots) -> None:
    """Charge the budget for the tapes of the steps taken, or for their checkpoints, in place of the worst case."""
    most = solve.steps.steps - 1
    assert solve.refund is not None
    solve.refund()
    ram, disk = min(slots.ram, most), min(slots.disk, most)
    if solve.tapes:
        solve.charge(ram, len(solve.tapes) * (solve.solver.tape_bytes or 0), 0)
    else:
        solve.charge(ram, ram * slots.checkpoint_bytes, disk * slots.checkpoint_bytes)
