"""The plan of a solve: which tapes and checkpoints it keeps, chosen among candidates by predicted time.

A step whose graph is kept from the forward pass is not recomputed. But a graph is many times larger than a checkpoint,
and a checkpoint saves the recomputation of several steps. The work of a plan is counted in forward steps, because each
adjoint step is run once in every plan.

Every plan may restart from the initial state, which autograd keeps alive: a slot that costs nothing. Every tape that is
held between the passes is charged to the budget. If none fits, the forward pass ends without one, and the backward pass
recomputes the last step too.

A schedule acts on units: segments of so many successive steps, of which the last may be shorter. Tapes and checkpoints
belong to units. With segments of one step a unit is a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from mpi4py import MPI

from pnode_dist.checkpointing.binomial import multistage, optimal_forward_steps, places, traffic
from pnode_dist.checkpointing.budget import CheckpointBudget, Slots, agree_on_slots
from pnode_dist.checkpointing.costs import Costs
from pnode_dist.checkpointing.hierarchical import HierarchicalSchedule, hierarchical, is_affordable
from pnode_dist.checkpointing.schedule import Action, whole_solve
from pnode_dist.errors import ConfigurationError

_MOST_DIVISIONS = 256


@dataclass(frozen=True)
class Plan:
    """A plan to solve `steps` steps in `units` of at most `segment` steps, and to reverse them.

    The tapes of the last `kept` units are kept from the forward pass, at the given `level`. The units before them are
    reversed by `schedule` from the initial state, and from `ram` and `disk` checkpoints. `forward_steps` counts all
    runs of a step, the first one included. `disk_writes` and `disk_reads` count checkpoints. `ram_bytes` and
    `disk_bytes` are the memory that the checkpoints and tapes occupy between the passes on the fullest rank, with a
    full tape for a shorter last unit. `seconds` is the predicted time on the slowest rank, None if nothing was
    measured.
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
    segment: int = 1
    units: int = 1

    @property
    def kept_steps(self) -> int:
        """The number of steps whose tapes are kept from the forward pass, about that if segments are unequal."""
        if self.units > -(-self.steps // self.segment):
            return round(self.kept * self.steps / self.units)
        return self.steps - (self.units - self.kept) * self.segment if self.kept else 0

    @property
    def recomputed_steps(self) -> int:
        """The number of recomputed steps."""
        return self.forward_steps - self.steps

    @property
    def work(self) -> tuple[str, int, int, int, int]:
        """The work of the plan. Plans of equal work are the same plan under different names."""
        return self.level, self.kept, self.forward_steps, self.disk_writes, self.disk_reads

    def actions(self) -> Iterator[Action]:
        """Return the schedule of the whole solve. Its steps are units."""
        if self.hierarchy is not None:
            head = self.hierarchy.actions()
        else:
            head = multistage(_reversed_by_schedule(self.units, self.kept), self.ram, self.disk)
        return whole_solve(head, self.units, self.kept)

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


@dataclass(frozen=True)
class _Task:
    """A solve to plan: its slots, its steps in `units` of at most `segment` steps, and the measured costs."""

    slots: Slots
    steps: int
    segment: int
    units: int
    costs: Costs | None


def _task(slots: Slots, steps: int, segment: int, units: int | None, costs: Costs | None) -> _Task:
    segment = min(segment, steps)
    return _Task(slots, steps, segment, -(-steps // segment) if units is None else units, costs)


def plan(
    budget: CheckpointBudget, checkpoint_bytes: int, steps: int, costs: Costs, comm: MPI.Comm, segment: int = 1
) -> Plans:
    """Return the candidate plans for a solve of `steps` steps within `budget`, and the best one. Collective on `comm`.

    `checkpoint_bytes` is the size of this rank's part of a checkpoint. `costs` are this rank's measurements. All ranks
    get the same plan. Raises `ConfigurationError` if the budget is too small, with the smallest that works.
    """
    slots = agree_on_slots(budget, checkpoint_bytes, steps, True, comm)
    agreed = costs.agreed(comm)
    return best(budget, slots, steps, agreed.levels[budget.level].bytes, agreed, segment)


def best(
    budget: CheckpointBudget,
    slots: Slots,
    steps: int,
    tape_bytes: int,
    costs: Costs | None,
    segment: int = 1,
    units: int | None = None,
) -> Plans:
    """Choose the plan with the least predicted time; without costs that with the fewest steps and disk accesses.

    `tape_bytes` is the size of a step's tape at the level of the budget. `segment` is the number of steps in a unit of
    the schedule; a unit has at most all steps. `units` is the number of units, if not all are as long as possible.
    Raises `ConfigurationError` if a setting of the budget asks for more than fits, and `ValueError` for a segment
    without steps.
    """
    if segment < 1:
        raise ValueError(f"segment = {segment}: must be at least 1")
    task = _task(slots, steps, segment, units, costs)
    different: dict[Any, Plan] = {}
    for candidate in _candidates(budget, task, tape_bytes):
        different.setdefault(candidate.work, candidate)
    candidates = tuple(different.values())
    chosen = min(
        candidates,
        key=lambda p: (p.seconds or 0.0, p.forward_steps, p.disk_writes + p.disk_reads, -p.kept),
    )
    return Plans(candidates, chosen, slots, costs)


def check_plan(plan: Plan, steps: int, slots: Slots, segment: int = 1, units: int | None = None) -> None:
    """Raise `ConfigurationError` if `plan` is for other steps or segments, or needs more than the slots."""
    if plan.steps != steps:
        raise ConfigurationError(f"plan {plan.name!r} is for {plan.steps} steps, not for {steps}")
    if plan.segment != min(segment, steps):
        raise ConfigurationError(f"plan {plan.name!r} is for segments of {plan.segment} steps, not of {segment}")
    if units is not None and plan.units != units:
        raise ConfigurationError(f"plan {plan.name!r} is for {plan.units} segments, not for {units}")
    # Checkpoints are limited by their number, which may be given instead of bytes.
    too_many = plan.ram > slots.ram or plan.disk > slots.disk
    if too_many or (plan.kept and plan.ram_bytes > slots.ram_bytes):
        raise ConfigurationError(
            f"plan {plan.name!r} needs ram = {plan.ram_bytes}, disk = {plan.disk_bytes}: more than the trajectory has"
        )


def needs_costs(
    budget: CheckpointBudget, slots: Slots, steps: int, tape_bytes: int, segment: int = 1, units: int | None = None
) -> bool:
    """Return True if the choice depends on the costs of the disk. See `best` for the arguments."""
    task = _task(slots, steps, segment, units, None)
    if slots.disk == 0 or slots.ram >= task.units - 1 or budget.schedule in ("all", "revolve", "multistage"):
        return False
    if budget.schedule == "auto" and (budget.ram_slots, budget.disk_slots) != (None, None):
        return False
    return not budget.keeps_steps or task.units * task.segment * tape_bytes > slots.ram_bytes


def _candidates(budget: CheckpointBudget, task: _Task, tape_bytes: int) -> Iterator[Plan]:
    level, schedule, slots, units = budget.level, budget.schedule, task.slots, task.units
    needed = units * task.segment * tape_bytes
    if budget.keep == "graph":
        if needed > slots.ram_bytes:
            raise ConfigurationError(
                f"trajectory: keep = 'graph': the graphs of {task.steps} steps need ram = {needed * budget.solves}, "
                f"more than {_left_of(budget, 'ram')}"
            )
        yield _plan(task, level, (units, 0, 0), tape_bytes)
        return
    if schedule == "all" and slots.ram + slots.disk < units - 1:
        _refuse_all(budget, task)
    most_kept = units if budget.keeps_steps and (needed <= slots.ram_bytes or schedule != "all") else 1
    for disk in _disks(schedule, slots):
        for most in (most_kept, 1):
            yield from _plans_with(task, level, schedule, tape_bytes, most, disk)
        if budget.keep == "auto" and most_kept > 1 and task.costs is not None:
            plans = _plans_with(task, "stages", schedule, task.costs.levels["stages"].bytes, most_kept, disk)
            yield from (plan for plan in plans if plan.kept)


def _refuse_all(budget: CheckpointBudget, task: _Task) -> NoReturn:
    key, needed = "ram", (task.units - 1) * task.slots.checkpoint_bytes * budget.solves
    if budget.ram_slots is not None:
        key, needed = "ram_slots", task.units - 1
    held = f"{task.units} segments" if task.segment > 1 else f"{task.steps} steps"
    raise ConfigurationError(
        f"trajectory: schedule = 'all': the states of {held} need {key} = {needed}, more than "
        f"{_left_of(budget, key)} (and disk = {budget.disk!r})"
    )


def _left_of(budget: CheckpointBudget, key: str) -> str:
    """Describe the part of `ram` or `ram_slots` that a solve gets, for an error message."""
    others, given = budget.ledger.solves, repr(getattr(budget, key))
    if key != "ram" or not others:
        return given
    return f"the {others} other solve(s) that await their backward pass leave of {given} with solves = {budget.solves}"


def _disks(schedule: str, slots: Slots) -> list[int]:
    """Return the numbers of checkpoints on disk to consider."""
    on_disk = [0, slots.disk] if slots.disk else [0]
    return on_disk[-1:] if schedule in ("all", "multistage", "h-revolve") else on_disk


def _plans_with(task: _Task, level: str, schedule: str, tape_bytes: int, most_kept: int, disk: int) -> Iterator[Plan]:
    """Yield the plans for one division of the budget: with the fewest steps, and with the least time by the costs."""
    division = divide(task.slots, task.units, task.segment * tape_bytes, most_kept, disk)
    yield _plan(task, level, division, tape_bytes)
    kept, _, on_disk = division
    by_costs = task.costs is not None and schedule in ("auto", "h-revolve")
    if on_disk and by_costs and is_affordable(_reversed_by_schedule(task.units, kept), on_disk):
        yield _plan(task, level, division, tape_bytes, by_costs=True)


def _plan(task: _Task, level: str, division: tuple[int, int, int], tape_bytes: int, by_costs: bool = False) -> Plan:
    kept, ram, disk = division
    costs, units, segment = task.costs, task.units, task.segment
    length = _reversed_by_schedule(units, kept)
    hierarchy = None
    if by_costs:
        assert costs is not None
        write, read = (costs.copy + costs.exposed * seconds for seconds in (costs.write, costs.read))
        unit = segment * costs.step
        hierarchy = hierarchical(length, ram, disk, write / unit, read / unit)
    counts = traffic(length, ram, disk) if hierarchy is None else hierarchy.traffic
    runs = counts.forward_steps + kept - 1
    if units > -(-task.steps // segment):
        # Outputs cut some segments short. They are taken to be of equal length.
        forward_steps = round(runs * task.steps / units)
    else:
        # The last unit runs once with a kept tape, and twice without. It may have fewer steps.
        forward_steps = segment * runs - (units * segment - task.steps) * (1 if kept else 2)
    writes, reads = counts.disk_writes, counts.disk_reads
    schedule = level if kept == units else _schedule_name(length, kept, ram, disk, by_costs)
    found = Plan(
        name=schedule,
        steps=task.steps,
        level=level,
        kept=kept,
        schedule=schedule,
        ram=ram,
        disk=disk,
        forward_steps=forward_steps,
        disk_writes=writes,
        disk_reads=reads,
        ram_bytes=ram * task.slots.checkpoint_bytes + kept * segment * tape_bytes,
        disk_bytes=disk * task.slots.checkpoint_bytes,
        seconds=costs.seconds(level, task.steps, forward_steps, counts.copies, writes, reads) if costs else None,
        hierarchy=hierarchy,
        segment=segment,
        units=units,
    )
    return replace(found, name=f"{level} of {found.kept_steps} + {schedule}") if 1 < kept < units else found


def _schedule_name(length: int, kept: int, ram: int, disk: int, by_costs: bool) -> str:
    if by_costs:
        return "h-revolve"
    if ram + disk == 0:
        return "restart"
    if kept <= 1 and ram + disk == places(length):
        return "all"
    return "multistage" if disk else "revolve"


def _reversed_by_schedule(units: int, kept: int) -> int:
    """Return the number of units that a schedule reverses: those without a kept tape, and the first with one.

    Without tapes an empty unit at the end takes the place of the latter.
    """
    return units - kept + 1


def divide(slots: Slots, units: int, tape_bytes: int, most_kept: int, disk: int) -> tuple[int, int, int]:
    """Divide the budget: return the number of tapes of the last units, and of checkpoints in memory and on disk.

    There are at most `most_kept` tapes, each of `tape_bytes`, and possibly none. The division needs the fewest steps;
    of equal ones it has the most tapes, because its backward pass starts at once. Considers every number of tapes up to
    256, and as many evenly spaced ones beyond that.
    """
    most = min(slots.ram_bytes // tape_bytes, most_kept) if tape_bytes else most_kept
    numbers = {*range(0, most, max(most // _MOST_DIVISIONS, 1)), most}

    def division(kept: int) -> tuple[int, int, int]:
        useful = places(_reversed_by_schedule(units, kept))
        ram = min(slots.ram, useful)
        if kept and slots.checkpoint_bytes:
            ram = min(ram, (slots.ram_bytes - kept * tape_bytes) // slots.checkpoint_bytes)
        return kept, ram, min(disk, useful - ram)

    def forward_units(division: tuple[int, int, int]) -> int:
        kept, ram, on_disk = division
        return optimal_forward_steps(_reversed_by_schedule(units, kept), ram + on_disk + 1) + kept - 1

    return min((division(kept) for kept in sorted(numbers, reverse=True)), key=forward_units)
