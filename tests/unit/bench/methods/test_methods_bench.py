"""The comparison of methods counts what the theory says, measures the memory taken, and its verdicts can be lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pnode_dist.bench.methods import run as bench
from pnode_dist.bench.methods.accuracy import TRAINED, compare_while_training
from pnode_dist.bench.methods.cell import SHARES, Cell, Result, in_share, measure_cell, verdicts
from pnode_dist.bench.methods.counts import Sizes, compare
from pnode_dist.bench.methods.experiments import Experiment, flow, images
from pnode_dist.bench.methods.gradient_methods import GRADIENT_METHODS
from pnode_dist.bench.methods.heap import Peak, bytes_in_use

MIB = 2**20


@pytest.mark.parametrize(("method", "stages"), [("euler", 1), ("bosh3", 3), ("dopri5", 6)])
def test_what_is_counted_is_the_paper_s_table(method: str, stages: int) -> None:
    rows, wrong = compare(method, Sizes(blocks=2, steps=3, stages=stages, layers=2))
    assert wrong == 0
    counted = {str(row["method"]): row for row in rows}
    assert set(counted) == set(GRADIENT_METHODS) - {"spilled"}
    everything = 2 * 3 * stages
    assert counted["NODE-naive"]["depth"] == f"Nb Nt Ns Nl = {2 * everything}, {2 * everything}"
    assert counted["ACA"]["again"] == "Nb Nt = 6, 6"
    assert counted["solution"]["states"] == "Nb (Nt-2) = 2, 2"


def test_a_wrong_theory_is_noticed() -> None:
    _, wrong = compare("rk4", Sizes(blocks=2, steps=2, stages=3, layers=1))
    assert wrong > 0


def test_the_peak_is_that_of_the_tensors_that_were_alive_at_once() -> None:
    before = bytes_in_use()
    kept = torch.ones(MIB // 8, dtype=torch.float64)
    with Peak() as peak:
        for _ in range(5):
            other = kept + 1  # noqa: F841
    assert peak.bytes - before == pytest.approx(3 * MIB, abs=MIB / 16)
    # Freed before it could be seen, or never allocated by torch alone: what lives on is seen all the same.
    with Peak() as peak:
        block = bytearray(2 * MIB)
        torch.ones(2)
    assert peak.bytes - before >= 3 * MIB
    assert len(block) == 2 * MIB


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(images((3,), samples=1, stem=4, widths=(4, 8, 8, 8), features=4), marks=pytest.mark.nightly),
        pytest.param(flow((3,), samples=8, dimension=2, hidden=(8, 8), flows=2), marks=pytest.mark.nightly),
    ],
    ids=lambda experiment: experiment.name,
)
def test_all_ways_of_an_experiment_have_one_gradient_and_the_work_of_the_theory(experiment: Experiment) -> None:
    cell = measure_cell(experiment, "midpoint", 3, 1, list(GRADIENT_METHODS.values()))
    blocks = 4 if experiment.name == "images" else 2
    evaluations = blocks * 3 * 2
    assert set(GRADIENT_METHODS) <= set(cell.results)
    for name, result in cell.results.items():
        assert result.forward == evaluations, name
        if result.gradient_method.reverse_accurate:
            assert result.error <= bench.LARGEST_GRADIENT_ERROR, name
        assert result.bytes > 0
        assert result.seconds[0] > 0
    assert cell.results["NODE-cont"].error > 1e-6
    again = {name: cell.results[name].again for name in GRADIENT_METHODS}
    run_again = {"ANODE": 3 * blocks, "ACA": 3 * blocks, "solution": 2 * blocks, "spilled": 2 * blocks}
    assert again == {name: run_again.get(name, 0) for name in GRADIENT_METHODS}
    backward = {"NODE-naive": 0, "graph": 0, "solution": evaluations - 2 * blocks, "spilled": evaluations - 2 * blocks}
    assert {name: cell.results[name].backward for name in GRADIENT_METHODS} == {
        name: backward.get(name, evaluations) for name in GRADIENT_METHODS
    }
    assert len(bench.cell_rows(cell)) == len(cell.results)


def cell(**results: tuple[float, float]) -> Cell:
    """A cell of the seconds and MiB of NODE-naive, ANODE, ACA and of auto in all of the reference's memory."""
    names = {"naive": "NODE-naive", "anode": "ANODE", "aca": "ACA", "all": in_share(1.0), "half": in_share(0.5)}
    found = {
        names[key]: Result(GRADIENT_METHODS["graph"], (seconds,) * 3, int(size * MIB), 10, 0, 0, 0.0)
        for key, (seconds, size) in results.items()
    }
    return Cell("images", "rk4", 4, found, 3 * MIB)


BASELINES = {"naive": (1.0, 8.0), "anode": (1.6, 4.0), "aca": (1.5, 2.0)}


def test_auto_is_compared_with_the_fastest_baseline_that_fits() -> None:
    found = {verdict.share: verdict for verdict in verdicts(cell(**BASELINES, all=(1.04, 7.9), half=(1.55, 3.9)))}
    assert tuple(found) == SHARES
    assert (found[1.0].fastest, found[1.0].holds) == ("NODE-naive", True)
    assert (found[0.5].fastest, found[0.5].holds) == ("ACA", True)
    slower = {verdict.share: verdict for verdict in verdicts(cell(**BASELINES, all=(1.06, 7.9), half=(1.7, 3.9)))}
    assert not slower[1.0].holds
    assert not slower[0.5].holds
    assert slower[0.5].ratio == pytest.approx(1.7 / 1.5)


def test_auto_has_lost_where_it_does_not_fit_and_a_baseline_does() -> None:
    found = {verdict.share: verdict for verdict in verdicts(cell(**BASELINES))}
    assert not found[0.25].holds
    assert "does not fit: takes 3.0 MiB at least, of 2.0" in found[0.25].reason
    large = {**BASELINES, "anode": (1.6, 9.0), "aca": (1.5, 9.0)}
    # Where no baseline fits either there is nothing to compare; where auto does, it has won.
    assert [verdict.share for verdict in verdicts(cell(**large))] == [1.0]
    assert [v.share for v in verdicts(cell(**large, half=(9.0, 3.9))) if v.holds] == [0.5]


def test_the_continuous_adjoint_is_wrong_where_the_others_are_not() -> None:
    story = compare_while_training(list(GRADIENT_METHODS.values()), iterations=20)
    errors = {str(row["method"]): row for row in story.errors}
    assert set(errors) == set(GRADIENT_METHODS)
    for name, row in errors.items():
        if GRADIENT_METHODS[name].reverse_accurate:
            assert row["untrained"] <= 1e-12
            assert row["trained"] <= 1e-12
    assert errors["NODE-cont"]["trained"] > 1e-4
    assert [row["iteration"] for row in story.curves] == list(range(0, 21, 2))
    assert all(story.curves[-1][name] < story.curves[0][name] for name in TRAINED)


def test_the_report_says_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    won = cell(**BASELINES, all=(1.0, 7.9), half=(1.0, 3.9))
    won = replace(won, results={name: replace(result, error=1e-11) for name, result in won.results.items()})
    monkeypatch.setattr(bench, "measure", lambda *_: [won])
    monkeypatch.setattr(bench, "many_steps", lambda _: {"NODE-naive": 100, "solution": 25})
    monkeypatch.setattr(bench, "theory_beside_counts", lambda: ([], 1))
    monkeypatch.setattr(bench, "compare_while_training", lambda each: compare_while_training(each, iterations=2))
    report = bench.run()
    # Of four shares one does not fit and three quarters do not fit either: the other two are as fast as asked for.
    assert [(check.value, check.holds) for check in report.checks] == [
        (1e-11, False),
        (0.5, False),
        (0.25, True),
        (1, False),
    ]
    assert isinstance(report.as_dict()["further"], dict)
