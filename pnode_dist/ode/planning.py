"""`pnode-dist plan`: candidate plans for a solve within its budget, with predicted and measured times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.checkpointing.budget import DEFAULT, ScratchError
from pnode_dist.checkpointing.plan import Plan, Plans, plan
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.layout import State, layout_of
from pnode_dist.system.sizes import format_size

_REPEATS = 3
_SWEEP_POINTS = 12


@dataclass(frozen=True)
class SolveCase:
    """One solve of a training step, `solve(state, times, *args)` for a whole batch. Collective on the state ranks."""

    solve: NeuralODE
    state: State
    times: Sequence[float]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class SweepPoint:
    """A budget in memory, the plan chosen for it, and the measured seconds of a loss and gradient, or None."""

    ram: int
    plan: Plan
    measured: float | None


def plan_case(case: SolveCase) -> Plans:
    """Return the candidate plans of a solve, and the chosen one. Collective on the state ranks.

    Raises `ConfigurationError` for error control, where the number of steps is not known beforehand.
    """
    try:
        return case.solve.plan(case.state, case.times, *case.args)
    except ValueError as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"[solver] rtol, atol: {error}") from None


def measure(case: SolveCase, plans: Sequence[Plan | None], repeats: int = _REPEATS) -> list[float]:
    """Measure a sum of squares and its gradient with each plan; None is the plan chosen by default.

    Returns the median seconds on the slowest rank. The measurements are interleaved, so that a slow moment of the
    machine affects all plans alike. The first round does not count. Collective on the state ranks.
    """
    seconds: list[list[float]] = [[] for _ in plans]
    for repeat in range(repeats + 1):
        for number, fixed in enumerate(plans):
            taken = seconds_of(case, fixed)
            if repeat:
                seconds[number].append(taken)
    return [statistics.median(values) for values in seconds]


def seconds_of(case: SolveCase, fixed: Plan | None) -> float:
    """Measure one sum of squares and its gradient, on the slowest rank. Collective on the state ranks."""
    solve = case.solve
    comm = _comm(case)
    before, solve.fixed_plan = solve.fixed_plan, fixed
    layout, parts = layout_of(case.state)
    parts = tuple(part.detach().requires_grad_() for part in parts)
    try:
        comm.Barrier()
        began = time.perf_counter()
        states: Any = solve(layout.as_state(parts), case.times, *case.args)
        squares = sum(part.square().sum() for part in (states if layout.is_tuple else (states,)))
        torch.autograd.grad(squares, (*parts, *solve.parameters()), allow_unused=True)
        return float(comm.allreduce(time.perf_counter() - began, MPI.MAX))
    finally:
        solve.fixed_plan = before


def sweep(case: SolveCase, measured: bool, points: int = _SWEEP_POINTS) -> list[SweepPoint]:
    """Return the plans chosen for budgets in memory from one checkpoint to the graphs of all steps.

    The budget on disk is that of the solve. Leaves out budgets that are too small for its settings. Collective on the
    state ranks.
    """
    solve = case.solve
    given = solve.trajectory
    trajectory = given or DEFAULT
    plans = plan_case(case)
    assert plans.costs is not None
    steps = plans.chosen.steps
    least = max(plans.slots.checkpoint_bytes, 1)
    most = max(steps * plans.costs.levels[trajectory.level].bytes, 2 * least)
    found = []
    try:
        for ram in dict.fromkeys(int(size) for size in np.geomspace(least, most, points)):
            solve.trajectory = replace(trajectory, ram=ram * trajectory.solves, ram_slots=None)
            try:
                chosen = plan(solve.trajectory, plans.slots.checkpoint_bytes, steps, plans.costs, _comm(case)).chosen
            except ScratchError:
                raise
            except ConfigurationError:
                continue  # The budget is too small, on all ranks alike.
            found.append(SweepPoint(ram, chosen, measure(case, [chosen])[0] if measured else None))
    finally:
        solve.trajectory = given
    return found


def _comm(case: SolveCase) -> MPI.Comm:
    return MPI.COMM_SELF if case.solve.partition is None else case.solve.partition.comm


def as_table(plans: Plans, measured: Sequence[float] | None = None) -> list[dict[str, Any]]:
    """Return the candidates as rows of a table."""
    rows = []
    for number, candidate in enumerate(plans.candidates):
        row: dict[str, Any] = {
            "plan": candidate.name,
            "segment": candidate.segment,
            "recorded": candidate.kept_steps,
            "in memory": candidate.ram,
            "on disk": candidate.disk,
            "steps": candidate.forward_steps,
            "recomputed": candidate.recomputed_steps,
            "disk writes": candidate.disk_writes,
            "disk reads": candidate.disk_reads,
            "memory": format_size(candidate.ram_bytes),
            "disk": format_size(candidate.disk_bytes),
            "seconds": candidate.seconds,
        }
        if measured is not None:
            row["measured"] = measured[number]
        row["chosen"] = "yes" if candidate is plans.chosen else ""
        rows.append(row)
    return rows


def costs_table(plans: Plans) -> list[dict[str, Any]]:
    """Return the measured costs as rows of a table, in times of the slowest rank and bytes of the fullest."""
    costs = plans.costs
    assert costs is not None
    rows = [{"measured": "a step", "microseconds": 1e6 * costs.step, "memory": ""}]
    for name, level in costs.levels.items():
        rows.append(
            {
                "measured": f"a step recorded as {name}",
                "microseconds": 1e6 * level.record,
                "memory": format_size(level.bytes),
            }
        )
        rows.append({"measured": f"its adjoint from {name}", "microseconds": 1e6 * level.adjoint, "memory": ""})
    size = format_size(plans.slots.checkpoint_bytes)
    rows.append({"measured": "a checkpoint copied in memory", "microseconds": 1e6 * costs.copy, "memory": size})
    if plans.slots.disk:
        rows.append({"measured": "a checkpoint written to disk", "microseconds": 1e6 * costs.write, "memory": size})
        rows.append({"measured": "a checkpoint read from disk", "microseconds": 1e6 * costs.read, "memory": size})
    return rows
