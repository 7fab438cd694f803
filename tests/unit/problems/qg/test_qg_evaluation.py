"""Evaluation by long runs: scores and statistics go where they belong, and runs that blow up have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.config import EDDY
from pnode_dist.problems.qg.diagnostics import LAYERED, SPECTRA, Diagnostics, diagnose, flow
from pnode_dist.problems.qg.evaluation import Run, evaluated, evaluation_of
from pnode_dist.problems.qg.scores import DISTRIBUTIONAL, SPECTRAL, similarities

TIMES, POINTS = 4, 16


def states(amplitude: float, seed: int, times: int = TIMES) -> np.ndarray:
    """Red noise without a mean, in 1/s."""
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((times, POINTS, POINTS, 2)), axes=(1, 2))
    numbers = np.hypot(np.fft.fftfreq(POINTS)[:, None], np.fft.rfftfreq(POINTS)) * POINTS
    damped = spectrum / (1 + numbers[..., None]) ** 2
    damped[:, 0, 0] = 0
    field = np.fft.irfft2(damped, s=(POINTS, POINTS), axes=(1, 2))
    return amplitude * field / field.std()


def runs() -> dict[str, Run]:
    """Two runs of the truth, one without closure, one with a closure, and one that blew up."""
    truth = np.stack([states(1e-5, 1), states(1e-5, 2)])
    forcing = states(1e-12, 5)
    return {
        "truth": Run(truth, np.stack([forcing, forcing])),
        "no_closure": Run(states(3e-6, 3)),
        "model": Run(states(8e-6, 4), forcing),
        "backscatter": Run(states(1e-5, 6)[:2], None, 2.5),
    }


def all_of(run: Run) -> Diagnostics:
    """The statistics of all samples."""
    return diagnose(run.q, EDDY, run.forcing)


def late(run: Run) -> Diagnostics:
    """The statistics of the second half: two of four samples."""
    half = (..., slice(2, 4), slice(None), slice(None), slice(None))
    return diagnose(run.q[half], EDDY, None if run.forcing is None else run.forcing[half])


def test_the_scores_are_those_of_the_statistics_of_each_run() -> None:
    given = runs()
    figures, _ = evaluation_of(given, EDDY, 0.5)
    wanted = similarities(late(given["model"]), all_of(given["truth"]), late(given["no_closure"]))
    assert {row["statistic"]: row["model"] for row in figures["scores"]} == wanted
    assert all(row.keys() == {"statistic", "model"} for row in figures["scores"])
    ends = {row.pop("of"): row for row in figures["free_runs"]}
    assert ends["no_closure"] == {"days": 1.5, "blown_up": None, "distributional": 0.0, "spectral": 0.0}
    assert ends["backscatter"] == {"days": 0.5, "blown_up": 2.5, "distributional": None, "spectral": None}
    assert ends["model"]["distributional"] == pytest.approx(np.mean([wanted[name] for name in DISTRIBUTIONAL]))
    assert ends["model"]["spectral"] == pytest.approx(np.mean([wanted[name] for name in SPECTRAL]))


def test_the_variables_hold_the_statistics_in_the_order_of_the_runs() -> None:
    given = runs()
    _, variables = evaluation_of(given, EDDY, 0.5)
    assert list(variables["free_run"].values) == list(given)
    np.testing.assert_allclose(variables["sample_time"].values, [0, 0.5, 1, 1.5])
    model = late(given["model"])
    for name in SPECTRA:
        np.testing.assert_array_equal(variables[name].values[2], model.spectra[name])
        assert np.isnan(variables[name].values[3]).all()
        assert variables[name].dimensions == ("free_run", *(["layer"] if name in LAYERED else []), "wave_number")
    energy = variables["energy"].values
    state = flow(given["model"].q[1], EDDY)
    wanted = 0.1 * np.mean(state.u[..., 0] ** 2 + state.v[..., 0] ** 2)
    wanted += 0.4 * np.mean(state.u[..., 1] ** 2 + state.v[..., 1] ** 2)
    assert energy[2, 1] == pytest.approx(wanted, rel=1e-12)
    assert np.isfinite(energy[3, :2]).all()
    assert np.isnan(energy[3, 2:]).all()


def test_densities_integrate_to_the_share_of_the_values_inside() -> None:
    given = runs()
    _, variables = evaluation_of(given, EDDY, 0.5)
    for name in ("q", "KE"):
        cells = variables[f"cells_{name}"].values
        width = cells[:, 1] - cells[:, 0]
        shares = (variables[f"density_{name}"].values * width[:, None]).sum(-1)
        assert np.all(shares[:3] <= 1 + 1e-12)
        assert np.all(shares[0] > 0.99)
    q = late(given["model"]).values["q"][:, 1]
    cells = variables["cells_q"].values[1]
    width = cells[1] - cells[0]
    inside = np.abs(q - cells[30]) < width / 2
    assert variables["density_q"].values[2, 1, 30] == pytest.approx(inside.mean() / width, rel=1e-9)


def test_without_a_baseline_that_survives_there_are_no_scores() -> None:
    given = runs()
    given["no_closure"] = Run(given["no_closure"].q[:1], None, 0.5)
    figures, _ = evaluation_of(given, EDDY, 0.5)
    assert figures["scores"] == []
    assert all(row["spectral"] is None for row in figures["free_runs"])


@pytest.mark.parametrize("lacking", ["truth", "no_closure"])
def test_runs_without_truth_or_baseline_are_refused(lacking: str) -> None:
    given = {name: run for name, run in runs().items() if name != lacking}
    with pytest.raises(ConfigurationError, match=rf"evaluation: runs = .*: must have {lacking}"):
        evaluation_of(given, EDDY, 0.5)


def test_runs_in_tensors_of_a_partition_give_the_same(mesh: Mesh) -> None:
    given = runs()
    grid = GridPartition(MPI.COMM_SELF, (POINTS, POINTS), 2, "periodic")

    def tensors(run: Run) -> Run:
        parts: list[Any] = [None if value is None else torch.from_numpy(value) for value in (run.q, run.forcing)]
        return Run(*parts, run.blown_up)

    figures, variables = evaluated({name: tensors(run) for name, run in given.items()}, EDDY, 0.5, grid, mesh)
    assert figures == evaluation_of(given, EDDY, 0.5)[0]
    stored = variables["free_run_q"]
    assert stored.dimensions == ("free_run", "sample", "y", "x", "layer")
    assert stored.partition is grid
    np.testing.assert_allclose(stored.values[0], given["truth"].q[0], rtol=1e-6)
    np.testing.assert_allclose(stored.values[3, :2], given["backscatter"].q, rtol=1e-6)
    assert bool(stored.values[3, 2:].isnan().all())
