"""Figures that pictures compute from a file lead by lead are those of the whole variables."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pnode_dist.problems.common.forecast_plot import _spread
from pnode_dist.report.panels import each_lead, lead_errors

SHAPE = (4, 6, 5, 2)
RANDOM = np.random.default_rng(0)
TRUTH, FORECAST = RANDOM.normal(size=SHAPE) + 100.0, RANDOM.normal(size=SHAPE) + 100.0


def file_of(path: Path, axis: int, truth: np.ndarray = TRUTH) -> h5py.File:
    file = h5py.File(path, "w")
    for name, values in (("truth", truth), ("forecast", FORECAST)):
        file[name] = np.moveaxis(values, 1, axis)
    return file


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("power", [1, 2])
def test_errors_read_lead_by_lead_are_those_of_the_whole_variables(axis: int, power: int, tmp_path: Path) -> None:
    scale, mean = np.array([2.0, 0.5]), np.array([99.0, 101.0])
    with file_of(tmp_path / "f.h5", axis) as file:
        found = lead_errors(file["truth"], {"forecast": file["forecast"], "mean": mean}, axis, scale, power)
        assert [values.shape for values in each_lead(file["truth"], axis)] == [(4, 5, 2)] * 5
    for name, values in (("forecast", FORECAST[:, 1:]), ("mean", mean)):
        whole = (np.abs((values - TRUTH[:, 1:]) / scale) ** power).mean(axis=(0, 2, 3)) ** (1 / power)
        np.testing.assert_allclose(found[name], whole, rtol=1e-13)


def test_the_spread_of_entries_over_time_leaves_out_what_is_missing(tmp_path: Path) -> None:
    truth = TRUTH.copy()
    truth[0, 2:, 1, 0] = truth[0, :, 3, 1] = np.nan
    with file_of(tmp_path / "f.h5", 1, truth) as file:
        found = _spread(file)
    expected = np.std(truth[0].reshape(6, -1), axis=0)
    expected[2] = np.std(truth[0, :2, 1, 0])
    expected[7] = 0.0
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
