"""The plan of a solve: which tapes and checkpoints it keeps, chosen among candidates by predicted time.

A step whose graph is kept from the forward pass is not recomputed. But a graph is many times larger than a checkpoint,
and a checkpoint saves the recomputation of several steps. The work of a plan is counted in forward steps, because each
adjoint step is run once in every plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mpi4py import MPI

from pnode_dist.checkpointing import from_initial_state
from pnode_dist.checkpointing.binomial import (
    disk_traffic,
    memory_traffic,
    multistage,
    optimal_forward_steps,
    without_checkpoints,
)
from pnode_dist.checkpointing.budget import CheckpointBudget, Slots, agree_on_slots
from pnode_dist.checkpointing.costs import Costs
from pnode_dist.checkpointing.hierarchical import HierarchicalSchedule, hierarchical, is_affordable
from pnode_dist.checkpointing.schedule import Action, with_last_recorded
from pnode_dist.errors import ConfigurationError

_MOST_DIVISIONS = 256


@dataclass(frozen=True)
class Plan:
    """A plan to solve `steps` steps and reverse them.

    The tapes of the last `kept` steps are kept from the forward pass, at the given `level`. The steps before them are
    reversed by `schedule` from `ram` and `disk` checkpoints, and with `from_start` from the initial state too.
    `forward_steps` counts all runs of a step, the first one included. `disk_writes` and `disk_reads` count checkpoints.
    `ram_bytes` and `disk_bytes` are the memory that the plan occupies between its passes on the fullest rank. With
    `from_start` they include all tapes. Other plans keep at least the last step's tape, and do not include that one.
    `seconds` is the predicted time on the slowest rank, None if nothing was measured.
    """

    name: str
    steps: int
    level: str
    kept: int
    schedule: str
    ram: int
    disk: int
    forward_steps: int
    disk_writes: int
    disk_reads: int
    ram_bytes: int
    disk_bytes: int
    seconds: float | None
    hierarchy: HierarchicalSchedule | None = None
    from_start: bool = False

    @property
    def recomputed_steps(self) -> int:
        """The number of recomputed steps."""
        return self.forward_steps - self.steps

    @property
    def work(self) -> tuple[str, int, int, int, int]:
        """The work of the plan. Plans of equal work are the same plan under different names."""
        return self.level, self.kept, self.forward_steps, self.disk_writes, self.disk_reads

    def actions(self) -> Iterator[Action]:
        """Return the schedule of the whole solve."""
        first_kept = self.steps - self.kept + 1
        if self.from_start:
            head = from_initial_state.actions(first_kept, from_initial_state.tiers(first_kept, self.ram, self.disk))
        elif self.hierarchy is not None:
            head = self.hierarchy.actions()
        elif self.ram + self.disk:
            head = multistage(first_kept, self.ram, self.disk)
        else:
            head = without_checkpoints(first_kept)
        if self.kept == 0:
            return from_initial_state.without_tape(head, self.steps)
        return with_last_recorded(head, first_kept, self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        figures = {**self.__dict__, "recomputed_steps": self.recomputed_steps}
        del figures["hierarchy"]
        return figures


@dataclass(frozen=True)
class Plans:
    """All candidate plans, the chosen one, and the slots and costs that the predictions are based on."""

    candidates: tuple[Plan, ...]
    chosen: Plan
    slots: Slots
    costs: Costs | None

    def as_dict(self) -> dict[str, Any]:
        """Return the plans for JSON."""
        return {
            "chosen": self.chosen.name,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "slots": asdict(self.slots),
            "costs": self.costs.as_dict() if self.costs else None,
        }


def plan(budget: CheckpointBudget, checkpoint_bytes: int, steps: int, costs: Costs, comm: MPI.Comm) -> Plans:
    """Return the candidate plans for a solve of `steps` steps within `budget`, and the best one. Collective on `comm`.

    `checkpoint_bytes` is the size of this rank's part of a checkpoint. `costs` are this rank's measurements. All ranks
    get the same plan. Raises `ConfigurationError` if the budget is too small, with the smallest that works.
    """
    slots = agree_on_slots(budget, checkpoint_bytes, steps, True, comm)
    return best(budget, slots, steps, None, costs.agreed(comm))


def best(budget: CheckpointBudget, slots: Slots, steps: int, tape_bytes: int | None, costs: Costs | None) -> Plans:
    """Choose the plan with the least predicted time; without costs that with the fewest steps and disk accesses.

    `tape_bytes` is the size of a step's tape, None if at most one tape may be kept. `costs` override it. Raises
    `ConfigurationError` if a setting of the budget asks for more than fits.
    """
    different: dict[Any, Plan] = {}
    for candidate in _candidates(budget, slots, steps, tape_bytes, costs):
        different.setdefault(candidate.work, candidate)
    candidates = tuple(different.values())
    chosen = min(
        candidates,
        key=lambda p: (p.seconds or 0.0, p.forward_steps, p.disk_writes + p.disk_reads, -p.kept),
    )
    return Plans(candidates, chosen, slots, costs)


def check_plan(plan: Plan, steps: int, slots: Slots) -> None:
    """Raise `ConfigurationError` if `plan` is for another number of steps, or needs more than the slots."""
    if plan.steps != steps:
        raise ConfigurationError(f"plan {plan.name!r} is for {plan.steps} steps, not for {steps}")
    # Checkpoints are limited by their number, which may be given instead of bytes.
    too_many = plan.ram > slots.ram or plan.disk > slots.disk
    if too_many or (plan.kept > (not plan.from_start) and plan.ram_bytes > slots.ram_bytes):
        raise ConfigurationError(
            f"plan {plan.name!r} needs ram = {plan.ram_bytes}, disk = {plan.disk_bytes}: more than the trajectory has"
        )


def needs_costs(budget: CheckpointBudget, slots: Slots, steps: int, tape_bytes: int | None) -> bool:
    """Return True if the choice depends on the costs of the disk."""
    if slots.disk == 0 or slots.ram >= steps - 1 or budget.schedule in ("all", "revolve", "multistage"):
        return False
    if budget.schedule == "auto" and (budget.ram_slots, budget.disk_slots) != (None, None):
        return False
    return tape_bytes is None or _charged(budget, steps) * tape_bytes > slots.ram_bytes


def _charged(budget: CheckpointBudget, kept: int) -> int:
    """Return the number of tapes, of `kept` from the forward pass, that the budget is charged for."""
    return kept if budget.charges_all_tapes else kept - 1


def _candidates(
    budget: CheckpointBudget, slots: Slots, steps: int, tape_bytes: int | None, costs: Costs | None
) -> Iterator[Plan]:
    level, schedule = budget.level, budget.schedule
    if budget.keeps_steps:
        if costs is not None:
            tape_bytes = costs.levels[level].bytes
        assert tape_bytes is not None
        if _charged(budget, steps) * tape_bytes <= slots.ram_bytes:
            division = (steps, 0, 0)
            yield _plan(level, level, slots, steps, division, tape_bytes, costs, budget.charges_all_tapes)
        elif budget.keep == "graph":
            needed = (steps - 1) * tape_bytes * budget.solves
            raise ConfigurationError(
                f"trajectory: keep = 'graph': the graphs of {steps} steps need ram = {needed}, "
                f"more than {_left_of(budget, 'ram')}"
            )
        if budget.keep == "graph" or (steps == 1 and not budget.charges_all_tapes):
            return
        if budget.charges_all_tapes:
            yield from _plans_from_initial_state(level, schedule, slots, steps, tape_bytes, costs)
            if costs is not None:
                stages = costs.levels["stages"].bytes
                plans = _plans_from_initial_state("stages", schedule, slots, steps, stages, costs)
                yield from (plan for plan in plans if plan.kept)
            return
    most = steps - 1
    if most and slots.ram + slots.disk == 0:
        # The disk was lost, and there are no other slots.
        yield _plan("restart", level, slots, steps, (1, 0, 0), 0, costs)
        return
    if slots.ram + slots.disk >= most and schedule in ("auto", "all"):
        ram = min(slots.ram, most)
        yield _plan("all", level, slots, steps, (1, ram, most - ram), 0, costs)
    if schedule == "all":
        if slots.ram + slots.disk < most:
            key, needed = "ram", most * slots.checkpoint_bytes * budget.solves
            if budget.ram_slots is not None:
                key, needed = "ram_slots", most
            raise ConfigurationError(
                f"trajectory: schedule = 'all': the states of {steps} steps need {key} = {needed}, more than "
                f"{_left_of(budget, key)} (and disk = {budget.disk!r})"
            )
        return
    yield from _checkpointed(level, schedule, slots, steps, tape_bytes if budget.keeps_steps else None, costs)


def _left_of(budget: CheckpointBudget, key: str) -> str:
    """Describe the part of `ram` or `ram_slots` that a solve gets, for an error message."""
    others, given = budget.ledger.solves, repr(getattr(budget, key))
    if key != "ram" or not others:
        return given
    return f"the {others} other solve(s) that await their backward pass leave of {given} with solves = {budget.solves}"


def _plans_from_initial_state(
    level: str, schedule: str, slots: Slots, steps: int, tape_bytes: int, costs: Costs | None
) -> Iterator[Plan]:
    """Yield the plans that restart from the initial state, with the best number of tapes, which may be none."""
    for disk in _disks(schedule, slots):
        kept, ram, on_disk = division = divide_from_initial_state(slots, steps, tape_bytes, disk)
        name = "multistage" if on_disk else "revolve"
        yield _plan(name, level, slots, steps, division, tape_bytes, costs, True)
        if disk and costs is not None and schedule != "multistage":
            # `hierarchical` needs a checkpoint of the initial state too.
            left = slots.ram_bytes - kept * tape_bytes
            places = steps - max(kept, 1) + (kept == 0)
            ram = min(left // slots.checkpoint_bytes, places) if slots.checkpoint_bytes else places
            on_disk = min(disk, places - ram)
            if kept < steps and ram + on_disk and is_affordable(steps - kept + 1, disk):
                division = (kept, ram, on_disk)
                yield _plan("h-revolve", level, slots, steps, division, tape_bytes, costs, True, by_costs=True)


def _disks(schedule: str, slots: Slots) -> list[int]:
    """Return the numbers of checkpoints on disk to consider."""
    on_disk = [0, slots.disk] if slots.disk else [0]
    return on_disk[-1:] if schedule in ("multistage", "h-revolve") else on_disk


def _checkpointed(
    level: str, schedule: str, slots: Slots, steps: int, tape_bytes: int | None, costs: Costs | None
) -> Iterator[Plan]:
    """Yield the plans with fewer checkpoints than steps, without and with tapes of the last steps."""
    for disk in _disks(schedule, slots):
        if slots.ram + disk == 0 and steps > 1:
            continue
        for division in dict.fromkeys([divide(slots, steps, tape_bytes, disk), divide(slots, steps, None, disk)]):
            size = tape_bytes or 0
            yield _plan("multistage" if disk else "revolve", level, slots, steps, division, size, costs)
            kept, ram, _ = division
            if disk and costs is not None and schedule != "multistage" and is_affordable(steps - kept + 1, disk):
                yield _plan("h-revolve", level, slots, steps, (kept, ram, disk), size, costs, by_costs=True)


def _plan(
    schedule: str,
    level: str,
    slots: Slots,
    steps: int,
    division: tuple[int, int, int],
    tape_bytes: int,
    costs: Costs | None,
    charges_all: bool = False,
    by_costs: bool = False,
) -> Plan:
    kept, ram, disk = division
    first_kept = steps - kept + 1
    hierarchy = None
    from_start = charges_all and not by_costs
    if from_start:
        forward_steps = optimal_forward_steps(first_kept, ram + disk + 1)
        (writes, reads), copies = from_initial_state.traffic(
            first_kept, from_initial_state.tiers(first_kept, ram, disk)
        )
    elif by_costs:
        assert costs is not None
        write, read = (costs.copy + costs.exposed * seconds for seconds in (costs.write, costs.read))
        hierarchy = hierarchical(first_kept, ram, disk, write / costs.step, read / costs.step)
        forward_steps = hierarchy.forward_steps
        writes, reads, copies = hierarchy.disk_writes, hierarchy.disk_reads, hierarchy.memory_copies
    elif ram + disk or first_kept == 1:
        forward_steps = optimal_forward_steps(first_kept, ram + disk)
        (writes, reads), copies = disk_traffic(first_kept, ram, disk), memory_traffic(first_kept, ram, disk)
    else:
        forward_steps, writes, reads, copies = first_kept * (first_kept + 1) // 2, 0, 0, 0
    forward_steps += kept - 1
    name = f"{level} of {kept} + {schedule}" if kept > 1 else schedule
    if kept == steps > 1:
        name = level
    return Plan(
        name=name,
        steps=steps,
        level=level,
        kept=kept,
        schedule=schedule,
        ram=ram,
        disk=disk,
        forward_steps=forward_steps,
        disk_writes=writes,
        disk_reads=reads,
        ram_bytes=ram * slots.checkpoint_bytes + (kept if charges_all else kept - 1) * tape_bytes,
        disk_bytes=disk * slots.checkpoint_bytes,
        seconds=costs.seconds(level, steps, forward_steps, copies, writes, reads) if costs else None,
        hierarchy=hierarchy,
        from_start=from_start,
    )


def divide(slots: Slots, steps: int, tape_bytes: int | None, disk: int) -> tuple[int, int, int]:
    """Divide the budget: return the number of tapes of the last steps, and of checkpoints in memory and on disk.

    `tape_bytes` is the size of a step's tape. One tape belongs to the working set of every adjoint and is not charged.
    At least one checkpoint remains unless every step has a tape. Of equal divisions the one with more tapes is chosen,
    because its backward pass starts at once. Considers every number of tapes up to 256, and as many evenly spaced ones
    beyond that.
    """
    most = steps - 1
    chosen = (1, min(slots.ram, most), min(disk, most - min(slots.ram, most)))
    if tape_bytes is None or steps == 1:
        return chosen
    if (steps - 1) * tape_bytes <= slots.ram_bytes:
        return steps, 0, 0
    work = optimal_forward_steps(steps, chosen[1] + chosen[2])
    most_kept = slots.ram_bytes // tape_bytes + 1
    for kept in range(2, most_kept + 1, -(-most_kept // _MOST_DIVISIONS)):
        rest = steps - kept
        left = slots.ram_bytes - (kept - 1) * tape_bytes
        ram = min(left // slots.checkpoint_bytes, rest, slots.ram) if slots.checkpoint_bytes else rest
        on_disk = min(disk, rest - ram)
        if ram + on_disk == 0:
            break
        needed = optimal_forward_steps(rest + 1, ram + on_disk) + kept - 1
        if needed <= work:
            chosen, work = (kept, ram, on_disk), needed
    return chosen


def divide_from_initial_state(slots: Slots, steps: int, tape_bytes: int, disk: int) -> tuple[int, int, int]:
    """Divide the budget of a solve that can restart from its initial state.

    See `divide`. Every tape is charged, and there may be none.
    """
    chosen, work = (0, 0, 0), steps * (steps + 3) // 2
    most_kept = min(slots.ram_bytes // tape_bytes, steps) if tape_bytes else steps
    for kept in range(0, most_kept + 1, max(-(-most_kept // _MOST_DIVISIONS), 1)):
        # The checkpoints besides the initial state.
        places = max(steps - kept - 1, 0) if kept else steps - 1
        left = slots.ram_bytes - kept * tape_bytes
        ram = min(left // slots.checkpoint_bytes, places, slots.ram) if slots.checkpoint_bytes else places
        on_disk = min(disk, places - ram)
        needed = optimal_forward_steps(steps - kept + 1, ram + on_disk + 1) + kept - 1
        if needed <= work:
            chosen, work = (kept, ram, on_disk), needed
    return chosen
