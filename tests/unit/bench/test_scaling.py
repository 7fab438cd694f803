"""The report of the scaling benchmark says what was measured, and its checks can fail."""

from __future__ import annotations

import math

import pytest

from pnode_dist.bench import scaling as bench
from pnode_dist.bench.cost_model import CostModel, Exchanges, Network, Work
from pnode_dist.bench.report import Report

MODEL = CostModel(
    work=Work(((64, 0.1), (2048, 1.0), (4096, 2.0))),
    exchanges=Exchanges((8,), 1),
    gradient_bytes=400,
    network=Network(1e-6, 1e9),
    contention=1.0,
    cores=2,
)


def report(two: float, threads: float = 1.2, torchdiffeq: float = 1.3, difference: float = 1e-15) -> Report:
    def parts(ranks: int, rows: int, seconds: float) -> bench.Parts:
        return bench.Parts(ranks, (rows, 64), (ranks, 1), seconds, halo=0.01, gradient_sum=0.001)

    measured = {
        ("strong", 1): parts(1, 64, 2.0),
        ("strong", 2): parts(2, 64, two),
        ("weak", 1): parts(1, 32, 1.0),
        ("weak", 2): parts(2, 64, two),
    }
    seconds = {key: part.seconds for key, part in measured.items()}
    seconds |= {("independent", 2): 1.02, ("threads", 1): threads, ("torchdiffeq", 1): torchdiffeq}
    return bench.report(measured, seconds, {2: difference}, MODEL, 2, (32, 64))


def row(found: Report, what: str, ranks: int) -> dict[str, str | int | float]:
    (one,) = (row for row in found.rows if (row["what"], row["ranks"]) == (what, ranks))
    return one


def test_rows_have_speed_ups_over_one_rank_and_efficiencies() -> None:
    found = report(1.1)
    strong = row(found, "strong", 2)
    assert (strong["speed-up"], strong["efficiency"]) == pytest.approx((2 / 1.1, 1 / 1.1))
    assert strong["work"] == pytest.approx(1.1 - 0.011)
    weak = row(found, "weak", 2)
    assert (weak["speed-up"], weak["efficiency"]) == pytest.approx((2 / 1.1, 1 / 1.1))
    assert row(found, "no messages", 2)["speed-up"] == pytest.approx(2 / 1.02)
    assert row(found, "one process, 2 threads", 2)["speed-up"] == pytest.approx(2 / 1.2)
    assert math.isnan(float(row(found, "torchdiffeq, 2 threads", 2)["predicted"]))


def test_projections_are_the_models() -> None:
    found = report(1.1)
    strong = row(found, "projected strong", 1024)
    predicted = MODEL.predict((64, 64), (32, 32), one_node=False).seconds
    assert strong["seconds"] == predicted
    assert strong["speed-up"] == pytest.approx(2.0 / predicted)
    weak = row(found, "projected weak", 16)
    assert weak["grid"] == "128x256"
    assert weak["efficiency"] == pytest.approx(1.0 / MODEL.predict((128, 256), (4, 4), one_node=False).seconds)


@pytest.mark.parametrize(
    ("arguments", "failing"),
    [
        ({"two": 1.1}, ""),
        ({"two": 1.15, "threads": 1.2}, "speed-up on 2 ranks"),
        ({"two": 1.1, "threads": 1.05}, "time over that of one process with 2 threads"),
        ({"two": 1.1, "torchdiffeq": 1.05}, "time over torchdiffeq's with 2 threads"),
        ({"two": 1.1, "difference": 2e-12}, "gradient on 2 ranks less that on one, float64, relative"),
        ({"two": 0.5}, "prediction for 2 ranks off by"),
    ],
)
def test_each_check_fails_alone(arguments: dict[str, float], failing: str) -> None:
    assert [check.name for check in report(**arguments).checks if not check.holds] == [failing] * bool(failing)


def test_numbers_of_ranks_double_up_to_all() -> None:
    assert [bench.rank_counts(size) for size in (1, 2, 3, 4, 7)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 7],
    ]


def test_projected_process_grids_are_as_square_as_powers_of_two_can_be() -> None:
    assert [bench.squarest(ranks) for ranks in (1, 2, 4, 8, 1024)] == [(1, 1), (2, 1), (2, 2), (4, 2), (32, 32)]
