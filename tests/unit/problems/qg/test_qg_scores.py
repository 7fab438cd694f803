"""Scores of runs: those of the published program, distances of scipy, and the fixed points 0 and 1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pnode_dist.problems.qg.config import EDDY
from pnode_dist.problems.qg.diagnostics import Diagnostics, diagnose
from pnode_dist.problems.qg.scores import (
    DISTRIBUTIONAL,
    SPECTRAL,
    differences,
    means,
    similarities,
    wasserstein_distance,
)

# Written by pyqg_reference.py beside it.
FILE = Path(__file__).parents[3] / "oracles" / "pyqg_reference.npz"
# The published differences are of twice the energy and twice the enstrophy at points.
DOUBLED = ("KE1", "KE2", "Ens1", "Ens2")


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def runs(reference: dict[str, np.ndarray]) -> dict[str, Diagnostics]:
    """The statistics of the truth on a finer grid, of a run with a closure, and of the baseline."""
    states = {name: reference[f"scored_{name}"].astype(np.float64) for name in ("truth", "run", "baseline")}
    forcings = {"run": reference["scored_run_forcing"]}
    return {name: diagnose(q, EDDY, forcings.get(name)) for name, q in states.items()}


def test_scores_are_those_of_the_published_program(
    runs: dict[str, Diagnostics], reference: dict[str, np.ndarray]
) -> None:
    found = similarities(runs["run"], runs["truth"], runs["baseline"])
    assert tuple(found) == (*DISTRIBUTIONAL, *SPECTRAL)
    for name, score in found.items():
        assert score == pytest.approx(float(reference[f"similarity_{name}"]), abs=1e-10), name


def test_differences_are_those_of_the_published_program(
    runs: dict[str, Diagnostics], reference: dict[str, np.ndarray]
) -> None:
    for name, difference in differences(runs["run"], runs["truth"]).items():
        wanted = float(reference[f"difference_{name}"]) / (2 if name in DOUBLED else 1)
        assert difference == pytest.approx(wanted, rel=1e-10), name


def test_the_truth_scores_one_and_the_baseline_zero(runs: dict[str, Diagnostics]) -> None:
    truth, baseline = runs["truth"], runs["baseline"]
    assert set(similarities(truth, truth, baseline).values()) == {1.0}
    assert set(similarities(baseline, truth, baseline).values()) == {0.0}
    assert similarities(baseline, truth, truth)["q1"] == -math.inf
    assert similarities(truth, truth, truth)["q1"] == 1.0


def test_a_spectral_difference_is_the_root_mean_square_below_both_cutoffs(runs: dict[str, Diagnostics]) -> None:
    run = runs["run"]
    spectra = {name: np.zeros_like(value) for name, value in run.spectra.items()}
    spectra["KEflux"] = np.array([3.0, 0, 4.0, *[1e9] * (len(run.wave_number) - 3)])
    nothing = {name: np.zeros_like(value) for name, value in spectra.items()}
    # Three bins lie below the smaller cutoff.
    cutoff = (run.wave_number[2] + run.wave_number[3]) / 2
    first = replace(run, spectra=spectra, resolved=cutoff)
    second = replace(run, spectra=nothing, resolved=2 * cutoff)
    assert differences(first, second)["KEflux"] == pytest.approx(math.sqrt(25 / 3), rel=1e-15)
    assert differences(second, first)["KEflux"] == pytest.approx(math.sqrt(25 / 3), rel=1e-15)


@pytest.mark.parametrize(("first", "second"), [(7, 7), (5, 11), (1, 4)])
def test_the_distance_of_samples_is_that_of_scipy(first: int, second: int) -> None:
    random = np.random.default_rng(first)
    one, other = random.standard_normal(first).round(1), 1 + 2 * random.standard_normal(second).round(1)
    wanted = stats.wasserstein_distance(one, other)
    assert wasserstein_distance(one, other) == pytest.approx(wanted, rel=1e-13)
    assert wasserstein_distance(other, one) == pytest.approx(wanted, rel=1e-13)
    assert wasserstein_distance(one, one) == 0


def test_the_distance_of_a_shifted_sample_is_the_shift() -> None:
    sample = np.random.default_rng(2).standard_normal((3, 4))
    assert wasserstein_distance(sample, sample + 0.25) == pytest.approx(0.25, rel=1e-12)


def test_mean_scores_are_of_ten_distributions_and_eight_spectra() -> None:
    scores = dict.fromkeys(DISTRIBUTIONAL, 0.0) | dict.fromkeys(SPECTRAL, 1.0) | {"q1": 1.0, "KEflux": -1.0}
    assert means(scores) == pytest.approx({"distributional": 0.1, "spectral": 0.75})
