"""`pnode-dist invert` of a field: its files and figures, missing values, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from matplotlib import image

from pnode_dist import Mesh
from pnode_dist.cli.main import main
from pnode_dist.inverse import minimise
from pnode_dist.problems.field.problem import build_field
from pnode_dist.runs.directory import save_parameters
from tests.unit.problems.field.synthetic_fields import (
    NX,
    NY,
    TIMES,
    VALIDATION,
    config,
    dataset,
    land,
    months,
    values,
    write,
)

TRAINING = TIMES - VALIDATION
INVERSE = {"every": 2, "observed": 2, "forecast": 2, "noise": 0.1, "length": (2.0, 3.0), "iterations": 30}
Capture = pytest.CaptureFixture[str]


def configured(directory: Path, data: xarray.Dataset | None = None, **inverse: Any) -> Path:
    """A configuration in a file, over a field in a file beside it."""
    field = write(directory / "f.nc", dataset(values()) if data is None else data)
    path = directory / "small.toml"
    missing = {"missing": "refuse" if data is None else "mask"}
    path.write_text(config(field, problem=missing, inverse=INVERSE | inverse).to_toml())
    return path


def invert(capfd: Capture, path: Path, *argv: str) -> dict[str, Any]:
    code = main(["invert", str(path), "--run-dir", str(path.parent / "run"), "--json", *argv])
    out, err = capfd.readouterr()
    assert code == 0, err
    figures: dict[str, Any] = json.loads(out)
    return figures


def complaint(capfd: Capture, path: Path) -> str:
    assert main(["invert", str(path), "--run-dir", str(path.parent / "run")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("pnode-dist: error: ")


@pytest.mark.slow
def test_an_analysis_is_nearer_to_cells_that_are_not_observed(tmp_path: Path, capfd: Capture) -> None:
    figures = invert(capfd, configured(tmp_path), "--set", "inverse.eigenvalues=5", "--set", "inverse.members=2")
    assert figures["ending"].startswith("converged: ")
    whole = np.where(land(), np.nan, values())
    window = slice(TRAINING, TRAINING + 4)
    chosen = np.zeros((NY, NX), dtype=bool)
    chosen[::2, ::2] = True
    assert figures["observations"] == 2 * (chosen & ~land()).sum()
    assert figures["compared"] == (~chosen & ~land()).sum()
    with xarray.open_dataset(tmp_path / "run/analysis.h5", engine="h5netcdf") as data:
        np.testing.assert_array_equal(data.time, months()[window])
        np.testing.assert_allclose(data.truth, whole[window], rtol=1e-6)
        np.testing.assert_array_equal(np.isfinite(data.observed[0]), chosen & ~land())
        assert not np.isfinite(data.observed[2:]).any()
        assert (np.isnan(data.analysis) == land()).all()
        assert (np.isnan(data.initial_deviation) == land()).all()
        assert (np.isnan(data.deviation) == land()).all()
        assert data.initial_deviation.attrs["units"] == "K"
        for number, row in enumerate(figures["rmse"]):
            for name in ("first_guess", "analysis"):
                error = (data[name][number].to_numpy().astype(float) - whole[window][number])[~chosen & ~land()]
                assert row[name] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
            error = (whole[TRAINING - 1] - whole[window][number])[~chosen & ~land()]
            assert row["persistence"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-9)
    assert figures["rmse"][0]["analysis"] < 0.8 * figures["rmse"][0]["first_guess"]
    assert [row["observed"] for row in figures["rmse"]] == ["yes", "yes", "no", "no"]
    picture = np.asarray(image.imread(tmp_path / "run/report.png"))[..., :3]
    assert (np.ptp(picture, axis=-1) > 0.1).mean() > 0.2


def test_a_minimisation_leaves_the_land_of_the_control_at_zero(tmp_path: Path, mesh: Mesh) -> None:
    path = write(tmp_path / "f.nc", dataset(values()))
    inverse = build_field(config(path, inverse=INVERSE), mesh, torch.float64).inverse()
    found = minimise(inverse, options={"tao_max_it": 4})
    (state,) = inverse.space.unpack(found.m)
    assert (state[torch.from_numpy(land())] == 0).all()
    assert (state[torch.from_numpy(~land())] != 0).all()


@pytest.mark.usefixtures("undrawn")
def test_missing_values_are_neither_observed_nor_compared(tmp_path: Path, capfd: Capture) -> None:
    field = np.where(land(), np.nan, values())
    hole, lost = (TRAINING + 1, 2, 2), (TRAINING + 2, 1, 1)
    field[hole] = field[lost] = field[TRAINING - 1, 4, 4] = np.nan
    figures = invert(capfd, configured(tmp_path, dataset(field, masked=False)), "--set", "inverse.iterations=1")
    chosen = np.zeros((NY, NX), dtype=bool)
    chosen[::2, ::2] = True
    assert figures["observations"] == 2 * (chosen & ~land()).sum() - 1
    assert figures["persistence_of"] == str(months()[TRAINING - 2].astype("datetime64[M]"))
    with xarray.open_dataset(tmp_path / "run/analysis.h5", engine="h5netcdf") as data:
        assert np.isnan(data.observed[1, 2, 2])
        assert np.isnan(data.truth[2, 1, 1])
        compared = ~chosen & np.isfinite(field[TRAINING + 2])
        error = (data.analysis[2].to_numpy().astype(float) - field[TRAINING + 2])[compared]
    assert figures["rmse"][2]["analysis"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)


def test_the_parameters_of_a_trained_run_are_those_of_the_equations(tmp_path: Path, mesh: Mesh) -> None:
    path = write(tmp_path / "f.nc", dataset(values()))
    (tmp_path / "run").mkdir()
    trained = build_field(config(path, run={"seed": 3}), mesh, torch.float64).model
    save_parameters(trained, tmp_path / "run/model.pt", mesh)
    tables = config(path, inverse=INVERSE | {"trained": str(tmp_path / "run")})
    inverse = build_field(tables, mesh, torch.float64).inverse()
    for found, wanted in zip(inverse.node.parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 3}, "[inverse] start + observed + forecast = 7: must be at most [problem] validation = 6, so that"),
        ({"every": 7}, "[inverse] every = 7: must be at most 6, the cells of the shorter axis"),
        ({"trained": "runs/none"}, "[inverse] trained = 'runs/none': runs/none/model.pt: there is no such file"),
    ],
)
def test_a_window_or_run_that_does_not_exist_is_refused(
    tmp_path: Path, capfd: Capture, change: dict[str, Any], message: str
) -> None:
    assert complaint(capfd, configured(tmp_path, **change)).startswith(message)
    assert not (tmp_path / "run").exists()


def test_observations_of_land_alone_are_refused(tmp_path: Path, capfd: Capture) -> None:
    field = np.where(land(), np.nan, values())
    field[:, ::2, ::2] = np.nan
    path = configured(tmp_path, dataset(field, masked=False))
    assert complaint(capfd, path) == "[inverse] every = 2, observed = 2: choose no cell that has a value"


@pytest.mark.nightly
@pytest.mark.usefixtures("undrawn")
def test_an_analysis_of_the_real_sea_beats_first_guess_and_persistence(tmp_path: Path, capfd: Capture) -> None:
    shipped = Path(__file__).parents[4] / "launch" / "configs" / "assimilate_sea_surface.toml"
    path = tmp_path / shipped.name
    path.write_text(shipped.read_text())
    figures = invert(capfd, path)
    assert figures["ending"].startswith("converged: ")
    assert figures["rmse"][0]["time"] == "2009-10"
    for row in figures["rmse"]:
        assert row["analysis"] < 0.8 * min(row["first_guess"], row["persistence"])
