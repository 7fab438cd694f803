"""Plans fit their budget, predict what happens when they are carried out, and the fastest of them is chosen."""

from __future__ import annotations

import json
import math
import random as pseudorandom
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.checkpointing import binomial, hierarchical
from pnode_dist.checkpointing.budget import Slots
from pnode_dist.checkpointing.costs import Costs, LevelCosts
from pnode_dist.checkpointing.plan import Plan, Plans, best, plan
from pnode_dist.checkpointing.schedule import Adjoint, Advance, EndForward, Record, Restart, Restore, Tier
from pnode_dist.checkpointing.spill import STAGING_BUFFERS, SpillPool
from tests.conftest import PATIENCE
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.effort import lines_executed
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random

CHECKPOINT, STEPS, TIMES = 48, 20, [0.0, 0.4, 1.0]


# Carrying plans out on step numbers alone


class Carried:
    """What a plan does when it is carried out: `did` counts, `most` is what was held at once; insists that it may."""

    def __init__(self, plan: Plan) -> None:
        self.did: Counter[str] = Counter()
        self.most = {Tier.RAM: 0, Tier.DISK: 0}
        held: dict[int, Tier] = {}
        recorded: set[int] = set()
        current: int | None = 0
        # The schedule counts in units of steps, of which the last may be shorter.
        left = end = math.ceil(plan.steps / plan.segment)
        lengths = [min(plan.segment, plan.steps - unit * plan.segment) for unit in range(end)]
        self.kept = 0
        for action in plan.actions():
            match action:
                case Advance(first, last, tier):
                    assert current == first < last <= left
                    if tier is not None:
                        assert first not in held
                        held[first] = tier
                        self.most[tier] = max(self.most[tier], list(held.values()).count(tier))
                        self.did[f"{tier.value} writes"] += 1
                    self.did["steps"] += sum(lengths[first:last])
                    current = last
                case Record(step):
                    assert current == step < left
                    recorded.add(step)
                    self.did["steps"] += lengths[step]
                    current = step + 1
                case EndForward():
                    assert current == end
                    self.kept = len(recorded)
                    self.kept_steps = sum(lengths[step] for step in recorded)
                case Restore(step, tier, discard):
                    assert held[step] is tier
                    self.did[f"{tier.value} reads"] += 1
                    current = step
                    if discard:
                        del held[step]
                case Restart():
                    current = 0
                case Adjoint(step):
                    assert step == left - 1
                    recorded.remove(step)
                    left, current = step, None
        assert left == 0
        assert not held
        assert not recorded


def assert_counts_are_those_predicted(plan: Plan) -> Carried:
    carried = Carried(plan)
    assert carried.did["steps"] == plan.forward_steps == plan.recomputed_steps + plan.steps
    assert (carried.did["disk writes"], carried.did["disk reads"]) == (plan.disk_writes, plan.disk_reads)
    assert carried.most[Tier.RAM] <= plan.ram
    assert carried.most[Tier.DISK] <= plan.disk
    assert (carried.kept, carried.kept_steps) == (plan.kept, plan.kept_steps)
    return carried


def seconds(plan: Plan, costs: Costs, carried: Carried) -> float:
    """What a plan takes by what it did, when a share of the disk's time stands in the way of steps."""
    did, level = carried.did, costs.levels[plan.level]
    moves = sum(did[f"{tier} {kind}"] for tier in ("ram", "disk") for kind in ("writes", "reads"))
    disk = did["disk writes"] * costs.write + did["disk reads"] * costs.read
    computing = plan.recomputed_steps * costs.step + plan.steps * (level.record + level.adjoint)
    return moves * costs.copy + max(computing + (1 - costs.overlapped) * disk, disk)


positive = st.floats(1e-3, 1e3)
costs_of_anything = st.builds(
    lambda step, copy, write, read, overlapped, graph, stages, size: Costs(
        step,
        copy,
        write,
        read,
        overlapped,
        {"graph": LevelCosts(4 * size, *graph), "stages": LevelCosts(size, *stages)},
    ),
    step=positive,
    copy=st.floats(0, 10),
    write=st.floats(0, 1e3),
    read=st.floats(0, 1e3),
    overlapped=st.sampled_from([0.0, 0.3, 1.0]),
    graph=st.tuples(positive, positive),
    stages=st.tuples(positive, positive),
    size=st.integers(1, 400),
)


def slots_of(ram: int, disk: int, checkpoint: int, steps: int) -> Slots:
    return Slots(min(ram // checkpoint, steps - 1), min(disk // checkpoint, steps - 1), checkpoint, ram)


@settings(max_examples=150, deadline=None)
@given(
    steps=st.integers(1, 60),
    ram=st.integers(0, 4000),
    disk=st.integers(0, 400),
    checkpoint=st.integers(1, 60),
    costs=costs_of_anything,
    schedule=st.sampled_from(["auto", "revolve", "multistage", "h-revolve"]),
    keep=st.sampled_from(["auto", "stages", "solution"]),
    segment=st.sampled_from([1, 1, 2, 5, 16]),
)
def test_every_candidate_fits_does_what_it_predicts_and_the_fastest_is_chosen(
    steps: int, ram: int, disk: int, checkpoint: int, costs: Costs, schedule: str, keep: str, segment: int
) -> None:
    slots = slots_of(ram, 0 if schedule == "revolve" else disk, checkpoint, steps)
    budget = Trajectory(ram=ram, disk=disk, schedule=schedule, keep=keep)
    plans = best(budget, slots, steps, costs.levels[budget.level].bytes, costs, segment)
    for candidate in plans.candidates:
        carried = assert_counts_are_those_predicted(candidate)
        assert candidate.ram <= slots.ram
        assert candidate.disk <= slots.disk
        assert candidate.segment == min(segment, steps)
        size = candidate.segment * costs.levels[candidate.level].bytes
        assert candidate.ram_bytes == candidate.ram * checkpoint + candidate.kept * size <= ram
        assert candidate.disk_bytes == candidate.disk * checkpoint <= disk
        assert candidate.seconds == pytest.approx(seconds(candidate, costs, carried), rel=1e-9)
    assert plans.chosen in plans.candidates
    assert plans.chosen.seconds == min(candidate.seconds or 0.0 for candidate in plans.candidates)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(2, 60),
    ram=st.integers(0, 3000),
    disk=st.integers(0, 8),
    checkpoint=st.integers(1, 60),
    recorded=st.integers(1, 400),
)
def test_without_costs_the_plan_has_the_fewest_steps_and_then_the_fewest_accesses(
    steps: int, ram: int, disk: int, checkpoint: int, recorded: int
) -> None:
    slots = slots_of(ram, disk * checkpoint, checkpoint, steps)
    plans = best(Trajectory(ram=ram, disk=disk * checkpoint), slots, steps, recorded, None)
    figures = [(c.forward_steps, c.disk_writes + c.disk_reads) for c in plans.candidates]
    assert (plans.chosen.forward_steps, plans.chosen.disk_writes + plans.chosen.disk_reads) == min(figures)
    assert plans.chosen.seconds is None
    for candidate in plans.candidates:
        assert_counts_are_those_predicted(candidate)


# Fast and slow disks


def costs_with(write: float, read: float, overlapped: float = 0.0, copy: float = 0.0) -> Costs:
    """A step takes a second, and a graph more memory than there is."""
    return Costs(
        1.0, copy, write, read, overlapped, {name: LevelCosts(10**9, 1.0, 2.0) for name in ("graph", "stages")}
    )


def plans_with(
    costs: Costs, steps: int = 200, ram: int = 3, disk: int = 12, schedule: str = "auto", keep: str = "auto"
) -> Plans:
    slots = Slots(ram, disk, 1, ram)
    return best(Trajectory(ram=ram, disk=disk, schedule=schedule, keep=keep), slots, steps, 10**9, costs)


def test_a_disk_that_costs_nothing_is_used_for_the_fewest_steps() -> None:
    plans = plans_with(costs_with(0.0, 0.0))
    assert plans.chosen.schedule in ("multistage", "h-revolve")
    fewest = fewest_solve_steps(200, 15, tapes=0)
    assert plans.chosen.forward_steps == fewest
    (revolve,) = (candidate for candidate in plans.candidates if candidate.schedule == "revolve")
    assert revolve.forward_steps == fewest_solve_steps(200, 3, tapes=0)
    assert plans.chosen.seconds == fewest - 200 + 200 * 3.0 < (revolve.seconds or 0.0)


def test_a_disk_slower_than_all_recomputation_is_not_used() -> None:
    plans = plans_with(costs_with(1e5, 1e5))
    assert plans.chosen.schedule == "revolve"
    assert (plans.chosen.disk_writes, plans.chosen.disk_reads) == (0, 0)
    assert any(candidate.disk_writes for candidate in plans.candidates)


@pytest.mark.parametrize("access", [0.1, 3.0, 10.0, 40.0])
def test_weighing_the_disk_s_costs_is_never_slower_and_touches_the_disk_less(access: float) -> None:
    plans = plans_with(costs_with(access, access))
    found = {candidate.schedule: candidate for candidate in plans.candidates}
    # Where the disk is too slow for any use, the weighed plan is that of the memory alone.
    weighed, unweighed = found.get("h-revolve", found["revolve"]), found["multistage"]
    assert (weighed.disk_writes == 0) == (access == 40.0)
    assert (weighed.seconds or 0.0) <= min(unweighed.seconds or 0.0, found["revolve"].seconds or 0.0) + 1e-9
    assert weighed.disk_writes + weighed.disk_reads <= unweighed.disk_writes + unweighed.disk_reads


def test_a_disk_that_works_beside_the_steps_costs_nothing_until_it_is_the_slowest() -> None:
    free = {c.schedule: c for c in plans_with(costs_with(0.0, 0.0)).candidates}
    hidden = {c.schedule: c for c in plans_with(costs_with(1.0, 1.0, overlapped=1.0)).candidates}
    waited = {c.schedule: c for c in plans_with(costs_with(1.0, 1.0, overlapped=0.0)).candidates}
    accesses = free["multistage"].disk_writes + free["multistage"].disk_reads
    assert hidden["multistage"].seconds == free["multistage"].seconds
    assert waited["multistage"].seconds == (free["multistage"].seconds or 0.0) + accesses
    slow = {c.schedule: c for c in plans_with(costs_with(1e6, 1e6, overlapped=1.0)).candidates}
    assert slow["multistage"].seconds == 1e6 * accesses
    assert plans_with(costs_with(1e6, 1e6, overlapped=1.0)).chosen.schedule == "revolve"


def test_a_checkpoint_that_costs_more_than_a_step_is_not_worth_keeping_more_of() -> None:
    # With graphs for the last steps there is a choice: recordings need no copies.
    cheap = replace(
        costs_with(0, 0, copy=0.0), levels={"graph": LevelCosts(4, 1.0, 2.0), "stages": LevelCosts(4, 1, 9)}
    )
    dear = replace(cheap, copy=100.0)
    slots = Slots(30, 0, 1, 30)
    few, many = (best(Trajectory(ram=30), slots, 40, 4, costs).chosen for costs in (dear, cheap))
    carried = [Carried(chosen).did for chosen in (few, many)]
    copies = [did["ram writes"] + did["ram reads"] for did in carried]
    assert copies[0] <= copies[1]


# Published counts, on real solves


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -u


@pytest.mark.slow
def test_real_solves_run_as_many_steps_as_the_published_optimum(tmp_path: Path) -> None:
    draw = pseudorandom.Random(1)
    u0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        steps = draw.randint(2, 60)
        ram, disk = draw.choice([(draw.randint(1, 8), 0), (draw.randint(0, 6), draw.randint(1, 6))])
        trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path, schedule="multistage")
        node = NeuralODE(decay, method="euler", step_size=0.125, trajectory=trajectory)
        (found,) = torch.autograd.grad(node(u0, [0.0, 0.125 * steps])[-1].sum(), [u0])
        solve = node.last_solve
        assert solve.forward_steps == solve.adjoint_steps == steps
        assert steps + solve.recomputed_steps == fewest_solve_steps(steps, ram + disk), (steps, ram, disk)
        # 7/8 to the power of the number of steps is rounded alike forward and backward.
        assert float(found) == pytest.approx(0.875**steps, rel=1e-13)


# Speed


@pytest.mark.parametrize(("ram", "disk"), [(10, 0), (10, 90), (3, 5000), (30_000, 40_000)])
@pytest.mark.parametrize("schedule", ["auto", "multistage", "h-revolve"])
def test_planning_a_hundred_thousand_steps_takes_few_lines_of_python_a_step(ram: int, disk: int, schedule: str) -> None:
    for cached in (
        binomial.optimal_forward_steps,
        binomial.first_advance,
        binomial.writes_and_reads,
        hierarchical.hierarchical,
    ):
        cached.cache_clear()
    costs = Costs(
        1e-3, 1e-5, 1e-2, 1e-2, 0.5, {"graph": LevelCosts(40, 1e-3, 2e-3), "stages": LevelCosts(4, 1e-3, 3e-3)}
    )
    trajectory = Trajectory(ram=8 * ram, disk=8 * disk, schedule=schedule)
    found: list[Plans] = []
    steps = 100_000
    assert lines_executed(lambda: found.append(plan(trajectory, 8, steps, costs, MPI.COMM_SELF))) < 100 * steps
    (plans,) = found
    assert plans.chosen.steps == steps
    assert plans.chosen.ram_bytes <= 8 * ram


# Plans of a module, carried out


@pytest.fixture
def node(tmp_path: Path) -> NeuralODE:
    """20 steps of 4 stages on states of 48 bytes, with checkpoints, stages and graphs of a part of them affordable."""
    # A graph holds the stages' states and the hidden layer.
    trajectory = Trajectory(12 * CHECKPOINT, 4 * CHECKPOINT, tmp_path)
    return NeuralODE(Network(), method="rk4", step_size=0.05, trajectory=trajectory)


def solved(node: NeuralODE) -> tuple[torch.Tensor, ...]:
    return gradients(lambda u: node(u, TIMES), random(2, 3), list(node.parameters()))


@pytest.mark.parametrize(
    "given",
    [
        {"ram": 12 * CHECKPOINT, "disk": 4 * CHECKPOINT},
        {"ram": 60 * CHECKPOINT, "disk": 2 * CHECKPOINT},
        {"ram": 60 * CHECKPOINT, "keep": "stages"},
        {"ram": 0, "disk": 6 * CHECKPOINT},
        {"ram": "1MiB", "disk": "1MiB"},
        {"ram": 3 * CHECKPOINT, "disk": 8 * CHECKPOINT, "keep": "solution", "schedule": "h-revolve"},
        {"ram": "1MiB", "schedule": "all"},
        {"ram": 12 * CHECKPOINT, "disk": 4 * CHECKPOINT, "checkpoint_dtype": "float64", "solves": 2},
        {"ram_slots": 2, "disk_slots": 3},
        {"ram": 0, "ram_slots": 4},
        {"ram": 16 * CHECKPOINT, "ram_slots": 2, "keep": "stages"},
    ],
    ids=str,
)
def test_every_candidate_gives_the_same_bits_and_the_counts_it_predicts(
    given: dict[str, object], node: NeuralODE, tmp_path: Path
) -> None:
    node.trajectory = Trajectory("1MiB", keep="graph")
    ample = solved(node)
    node.trajectory = Trajectory(directory=tmp_path, **given)  # type: ignore[arg-type]
    plans = node.plan(random(2, 3), TIMES)
    assert plans.costs is not None
    assert plans.costs.levels["stages"].bytes == 4 * CHECKPOINT
    for candidate in plans.candidates:
        assert_counts_are_those_predicted(candidate)
        assert candidate.ram <= (node.trajectory.ram_slots or STEPS)
        node.fixed_plan = candidate
        by_stages = candidate.kept > 0 and candidate.level == "stages"
        found = solved(node)
        assert distance(found, ample) <= 1e-14 if by_stages else identical(found, ample), candidate.name
        solve = node.last_solve
        assert node.last_plan is candidate
        assert solve.forward_steps == solve.adjoint_steps == STEPS
        assert solve.recomputed_steps == candidate.recomputed_steps
        assert solve.bytes_written == candidate.disk_writes * CHECKPOINT
        assert solve.bytes_read == candidate.disk_reads * CHECKPOINT
        assert solve.graph_steps == candidate.kept
        assert node.trajectory.ledger.ram == 0
    json.dumps(plans.as_dict())
    node.fixed_plan = None
    assert distance(solved(node), ample) <= 1e-14


def test_planning_counts_in_no_solve_and_leaves_nothing_behind(node: NeuralODE) -> None:
    solved(node)
    before = node.last_solve
    node.plan(random(2, 3).requires_grad_(), TIMES)
    assert node.last_solve is before
    assert node.trajectory is not None
    assert (node.trajectory.ledger.ram, node.trajectory.ledger.disk, node.trajectory.ledger.solves) == (0, 0, 0)
    assert all(parameter.grad is None for parameter in node.parameters())
    solved(node)
    # The evaluations of the probe are not those of the next solve.
    recorded = node.last_solve.recomputed_steps + STEPS
    extra = STEPS * 4 if node.last_plan is not None and node.last_plan.level == "stages" else 0
    assert node.last_solve.function_evaluations == 4 * recorded + extra


def test_what_was_planned_for_a_short_solve_does_not_mislead_a_long_one(node: NeuralODE) -> None:
    # A solve of one step needs no disk, so nothing is known of it then.
    node.plan(random(2, 3), [0.0, 0.05])
    solved(node)
    (solver,) = node._solvers._solvers.values()
    assert solver.costs is not None
    assert solver.costs.write > 0
    assert solver.costs.read > 0


def test_the_slot_that_is_measured_may_be_written_again_before_the_disk_has_it(tmp_path: Path) -> None:
    pool = SpillPool(4, np.dtype("float64"), tmp_path, 0)
    slot, found = pool.acquire(), np.empty(4)
    pool._file.start()
    pool._file.submit(lambda: time.sleep(0.1))
    for number in range(10):
        pool.write(slot, np.full(4, float(number)), number, 0.0)
    pool.read(slot, found)
    assert found.tolist() == [9.0] * 4
    with pool._file.changed:
        assert pool._file.changed.wait_for(lambda: len(pool._file.free_buffers) == STAGING_BUFFERS, timeout=PATIENCE)
    pool.read(slot, found)
    assert found.tolist() == [9.0] * 4
    # Nor does a state that was fetched for nothing keep its buffer.
    for number in range(10):
        pool.prefetch(slot)
        pool.write(slot, np.full(4, float(number)), number, 0.0)
    with pool._file.changed:
        assert pool._file.changed.wait_for(lambda: len(pool._file.free_buffers) == STAGING_BUFFERS, timeout=PATIENCE)


def test_a_plan_for_another_number_of_steps_is_refused_in_one_line(node: NeuralODE) -> None:
    node.fixed_plan = node.plan(random(2, 3), TIMES).chosen
    with pytest.raises(ConfigurationError, match="is for 20 steps, not for 10") as caught:
        node(random(2, 3).requires_grad_(), [0.0, 0.5])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "smaller"),
    [
        ({"ram": 8 * CHECKPOINT}, {"ram": 4 * CHECKPOINT}),
        ({"ram": 8 * CHECKPOINT}, {"ram": 8 * CHECKPOINT, "solves": 2}),
        ({"ram": CHECKPOINT, "disk": 6 * CHECKPOINT}, {"ram": CHECKPOINT, "disk": 3 * CHECKPOINT}),
        ({"ram_slots": 6}, {"ram_slots": 3}),
        ({"disk_slots": 6, "ram_slots": 0}, {"disk_slots": 3, "ram_slots": 0}),
    ],
    ids=str,
)
def test_a_plan_that_is_too_large_is_refused_in_one_line(
    given: dict[str, int], smaller: dict[str, int], node: NeuralODE, tmp_path: Path
) -> None:
    common = {"keep": "solution", "schedule": "multistage", "directory": tmp_path}
    node.trajectory = Trajectory(**common, **given)  # type: ignore[arg-type]
    node.fixed_plan = node.plan(random(2, 3), TIMES).chosen
    solved(node)
    node.trajectory = Trajectory(**common, **smaller)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"plan .* needs ram = [0-9]+, disk = [0-9]+: more than") as caught:
        node(random(2, 3).requires_grad_(), TIMES)
    assert "\n" not in str(caught.value)
    assert node.trajectory.ledger.solves == 0


@pytest.mark.parametrize(
    ("given", "fixed"),
    [
        ({"ram": 10 * CHECKPOINT, "disk": 9 * CHECKPOINT, "schedule": "all"}, False),
        ({"ram": 0, "disk": 19 * CHECKPOINT, "schedule": "all"}, False),
        ({"ram": 2 * CHECKPOINT, "disk": 9 * CHECKPOINT, "schedule": "multistage", "keep": "solution"}, True),
    ],
    ids=["all", "all on disk", "a fixed plan"],
)
def test_what_was_to_lie_on_a_disk_that_is_lost_is_run_again_by_later_solves(
    given: dict[str, object], fixed: bool, node: NeuralODE, tmp_path: Path
) -> None:
    directory = tmp_path / "scratch"
    directory.mkdir()
    node.trajectory = Trajectory(directory=directory, **given)  # type: ignore[arg-type]
    node.fixed_plan = node.plan(random(2, 3), TIMES).chosen if fixed else None
    ample = solved(node)
    assert node.last_solve.bytes_written > 0
    # Where the directory was there is a file now: the next solve finds no disk.
    shutil.rmtree(directory)
    directory.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="going on without checkpoints on disk"):
        assert identical(solved(node), ample)
    assert identical(solved(node), ample)
    assert node.last_solve.bytes_written == 0


# Schedules by name


def test_all_holds_the_state_before_every_step_and_runs_each_once_again(node: NeuralODE, tmp_path: Path) -> None:
    # The tape of the last step takes as much as 11 1/3 checkpoints.
    for ram, disk, tapes in ((19, 0, 0), (30, 0, 1), (10, 9, 0), (0, 19, 0)):
        node.trajectory = Trajectory(ram * CHECKPOINT, disk * CHECKPOINT, tmp_path, schedule="all")
        solved(node)
        solve = node.last_solve
        assert (solve.recomputed_steps, solve.graph_steps) == (STEPS - tapes, tapes)
        assert solve.checkpoint_bytes_peak == (STEPS - 1 - tapes) * CHECKPOINT
        assert solve.bytes_written == solve.bytes_read == disk * CHECKPOINT


def test_revolve_is_binomial_in_memory_and_leaves_the_disk_alone(node: NeuralODE, tmp_path: Path) -> None:
    node.trajectory = Trajectory(3 * CHECKPOINT, "1MiB", tmp_path / "missing", keep="solution", schedule="revolve")
    solved(node)
    assert node.last_solve.recomputed_steps + STEPS == fewest_solve_steps(STEPS, 3, tapes=0)
    assert node.last_solve.bytes_written == 0


def test_h_revolve_weighs_what_the_disk_takes(node: NeuralODE, tmp_path: Path) -> None:
    node.trajectory = Trajectory(2 * CHECKPOINT, 6 * CHECKPOINT, tmp_path, keep="solution", schedule="h-revolve")
    plans = node.plan(random(2, 3), TIMES)
    assert {candidate.schedule for candidate in plans.candidates} <= {"h-revolve", "multistage"}
    solved(node)
    assert node.last_plan is not None
    assert node.last_solve.bytes_written == node.last_plan.disk_writes * CHECKPOINT
    assert node.last_solve.recomputed_steps == node.last_plan.recomputed_steps


def refused_naming(node: NeuralODE, trajectory: Trajectory) -> int:
    """The budget in memory that the complaint about `trajectory` names."""
    node.trajectory = trajectory
    with pytest.raises(ConfigurationError) as caught:
        node(random(2, 3).requires_grad_(), TIMES)
    message = str(caught.value)
    assert "\n" not in message
    assert trajectory.ledger.solves == 0
    named = re.findall(r"ram = (\d+)", message)
    return int(named[-1])


@pytest.mark.parametrize("solves", [1, 3])
@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "all", "ram": 4 * CHECKPOINT},
        {"schedule": "all", "ram": 0, "disk": 5 * CHECKPOINT},
        {"schedule": "all", "ram": 0, "checkpoint_dtype": "float32"},
        {"schedule": "revolve", "ram": CHECKPOINT - 1, "disk": "1MiB"},
        {"schedule": "multistage", "ram": CHECKPOINT - 1, "keep": "solution"},
        {"schedule": "h-revolve", "ram": 0},
        {"keep": "graph", "ram": 4 * CHECKPOINT},
        {"keep": "graph", "ram": 0},
        {"keep": "stages", "ram": CHECKPOINT - 1},
        {"ram": 0},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_naming_the_memory_that_works_and_no_less_does(
    given: dict[str, object], solves: int, node: NeuralODE, tmp_path: Path
) -> None:
    trajectory = Trajectory(directory=tmp_path, solves=solves, **given)  # type: ignore[arg-type]
    named = refused_naming(node, trajectory)
    node.trajectory = replace(trajectory, ram=named)
    solved(node)
    if "disk" not in given:
        assert refused_naming(node, replace(trajectory, ram=named - 1)) == named


def test_schedule_all_with_too_few_checkpoints_names_the_number_that_works(node: NeuralODE) -> None:
    node.trajectory = Trajectory(ram_slots=3, schedule="all")
    with pytest.raises(ConfigurationError, match=r"schedule = 'all'.*ram_slots = 19"):
        node(random(2, 3).requires_grad_(), TIMES)
    node.trajectory = Trajectory(ram_slots=19, schedule="all")
    solved(node)


@pytest.mark.parametrize(("schedule", "least"), [("revolve", 1), ("auto", 1), ("all", 19)])
def test_no_checkpoint_at_all_is_answered_with_the_number_that_works(
    schedule: str, least: int, node: NeuralODE
) -> None:
    node.trajectory = Trajectory(ram_slots=0, schedule=schedule)
    with pytest.raises(ConfigurationError, match=f"too few checkpoints: .* ram_slots = {least}$") as caught:
        node(random(2, 3).requires_grad_(), TIMES)
    assert "\n" not in str(caught.value)
    node.trajectory = Trajectory(ram_slots=least, schedule=schedule)
    solved(node)


@pytest.mark.parametrize("given", [{"schedule": "all"}, {"keep": "graph"}], ids=str)
def test_where_another_solve_holds_what_is_needed_the_line_says_so(given: dict[str, str], node: NeuralODE) -> None:
    node.trajectory = Trajectory("1MiB", **given)  # type: ignore[arg-type]
    solved(node)
    size = node.last_solve.graph_bytes + (STEPS - 2) * CHECKPOINT
    node.trajectory = replace(node.trajectory, ram=size * 3 // 2)
    waiting = node(random(2, 3).requires_grad_(), TIMES)
    with pytest.raises(ConfigurationError, match=r"1 other solve\(s\) that await their backward pass leave of"):
        node(random(2, 3).requires_grad_(), TIMES)
    del waiting


@pytest.mark.parametrize("tolerance", ["rtol", "atol"])
def test_steps_with_error_control_cannot_be_planned(tolerance: str, node: NeuralODE) -> None:
    setattr(node, tolerance, 1e-6)
    node.method = "dopri5"
    with pytest.raises(ValueError, match=r"error control .* cannot be planned"):
        node.plan(random(2, 3), TIMES)
