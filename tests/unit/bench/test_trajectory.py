"""The benchmark of the trajectory compares like with like, and its checks can fail."""

from __future__ import annotations

import pytest
import torch

from pnode_dist.bench import trajectory as bench
from pnode_dist.bench.report import Row
from pnode_dist.checkpointing.budget import Trajectory
from tests.oracles.checkpointing import fewest_steps


@pytest.fixture
def subject() -> bench.Subject:
    return bench.convolutions(6, 3)


def test_plain_torch_takes_the_same_steps(subject: bench.Subject) -> None:
    case = subject.case(Trajectory("1GiB"))
    ours = case.solve(case.state, case.times)[-1]
    assert torch.allclose(ours, bench.plain_steps(subject, subject.state), rtol=1e-5, atol=1e-6)


def test_graphs_are_compared_with_all_graphs_kept(subject: bench.Subject) -> None:
    (row,), (check,) = bench.graphs(subject)
    assert row["detail"] == "3 graphs"
    assert check.value == pytest.approx(float(row["seconds"]) / float(row["reference"]))


@pytest.mark.parametrize("keep", ["solution", "stages"])
def test_recomputation_is_compared_with_the_evaluations_it_needs(subject: bench.Subject, keep: str) -> None:
    (row,), (check,) = bench.recomputation(subject, keep)
    assert subject.evaluations == 12
    allowed = float(row["reference"]) * bench.RECOMPUTATION_OVER_WORK + 12 * bench.SECONDS_PER_STAGE
    assert check.value == pytest.approx(float(row["seconds"]) / allowed)


def test_executed_steps_are_compared_with_the_published_optimum() -> None:
    _, (check,) = bench.executed_steps(10)
    assert check.holds
    assert check.value == 0
    assert all(bench._published_optimum(n, s) == fewest_steps(n, s) for n in range(1, 40) for s in range(1, n))


def test_the_planner_s_choices_and_predictions_are_counted() -> None:
    def row(ratio: float, predicted: float) -> Row:
        return {"what": "planner", "seconds": 1.0, "ratio": ratio, "predicted": predicted}

    rows = [row(1.0, 1.0), row(1.09, 0.8), row(1.2, 1.1), row(1.0, 1.3), row(1.0, 0.7), {"what": "graph"}]
    slow, wrong = bench.planner_checks(rows)
    assert (slow.value, wrong.value) == (1, 2)
    assert not slow.holds
    assert all("predicted" not in row for row in rows)


def test_a_long_trajectory_stays_finite_and_says_what_it_took() -> None:
    (row,), checks = bench.long_trajectory(60, 16, 8 * 16 * 16 * 2 * 8, 4 * 16 * 16 * 2 * 8)
    assert row["steps"] == 60
    # Of the last steps, up to 8, the stages may be kept instead of states. The initial state is one more checkpoint.
    assert int(row["recomputed"]) >= fewest_steps(52, 13) - 52
    assert checks[1].holds
