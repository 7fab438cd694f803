"""`pnode-dist invert`: its files, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest

from pnode_dist.cli.main import main
from pnode_dist.config.tables import TaoMethod
from pnode_dist.inverse import METHODS
from pnode_dist.report.run_curves import pictures
from pnode_dist.runs import metrics
from pnode_dist.runs.status import status_of
from pnode_dist.train.iterations import Iterations
from tests.unit.problems.gray_scott import plain_gray_scott
from tests.unit.problems.pendulum import plain_pendulum

Capture = pytest.CaptureFixture[str]


def text(**inverse: Any) -> str:
    """A small configuration whose minimisation takes a few iterations."""
    shortest = {"problem": {"times": 3, "trajectories": 1}, "evaluation": {"leads": (1, 2)}}
    settings = {"every": 3, "observed": 1, "noise": 0.05, "iterations": 30, "reduction": 0.05, **inverse}
    return plain_gray_scott.config(
        run={"name": "small"}, training={"batch_size": 1}, inverse=settings, **shortest
    ).to_toml()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(text())
    return path


def invert(capfd: Capture, config: Path, *argv: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The figures and the standard error of an inversion in the directory `run` beside the configuration."""
    found = main(["invert", str(config), "--run-dir", str(config.parent / "run"), "--json", *argv])
    out, err = capfd.readouterr()
    assert found == code, err
    return (json.loads(out) if out else {}), err


def complaint(capfd: Capture, *argv: Any) -> str:
    """The one line with which a command ends that cannot be carried out."""
    assert main(["invert", *map(str, argv)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("pnode-dist: error: ")


@pytest.mark.slow
def test_an_inversion_writes_its_analysis_metrics_and_figures(config: Path, capfd: Capture) -> None:
    figures, err = invert(capfd, config, "--set", "inverse.eigenvalues=20", "--set", "inverse.members=2")
    run = config.parent / "run"
    assert figures["ending"].startswith("converged: ")
    first, *_, last = figures["rmse"]
    assert last["analysis"] < 0.6 * last["first_guess"]
    assert [row["observed"] for row in figures["rmse"]] == ["no", "yes", "no"]
    assert figures["observations"] == 4 * 5 * 2
    assert len(figures["eigenvalues"]) == 20
    assert json.loads((run / "evaluation.json").read_text())["value"] == figures["value"]
    records = list(metrics.read(run / "metrics.jsonl"))
    assert [record["iteration"] for record in records] == list(range(figures["iterations"] + 1))
    assert records[-1]["value"] == figures["value"] < records[0]["value"]
    assert f"iteration {figures['iterations']}  J " in err
    status = status_of(run)
    assert (status.state, status.progress, status.step) == ("finished", 1.0, figures["iterations"])
    assert status.peak_memory > 2**20
    assert {picture.title for picture in pictures(records)} == {"Minimisation", "Gradient"}
    with h5py.File(run / "analysis.h5") as file:
        error = file["analysis"][:].astype(float) - file["truth"][:]
        assert np.sqrt((error[0] ** 2).mean()) == pytest.approx(first["analysis"], rel=1e-4)
        assert np.isfinite(file["observed"][1, ::3, ::3]).all()
        assert np.isnan(file["observed"][:]).sum() == file["observed"].size - figures["observations"]
        misfit = (file["observed"][1] - file["truth"][1])[::3, ::3]
        assert 0.03 < misfit.std() < 0.07
        assert file["initial_deviation"].shape == file["truth"].shape[1:]
        assert file["deviation"].shape == file["truth"].shape
    assert (run / "report.png").stat().st_size > 10_000


@pytest.mark.slow
def test_an_inversion_that_is_stopped_goes_on_to_the_same_minimum(
    config: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = invert(capfd, config)
    show = Iterations.show

    def stopping(self: Iterations, progress: Any, memory: int) -> None:
        show(self, progress, memory)
        if progress.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Iterations, "show", stopping)
        _, err = invert(capfd, config, "--overwrite", code=75)
    assert "stopped by SIGTERM on rank 0" in err
    assert "--resume auto goes on" in err
    run = config.parent / "run"
    assert status_of(run).state == "preempted"
    figures, err = invert(capfd, config, "--resume", "auto")
    assert err.count(f"going on from the evaluations in {run / 'record'}") == 1
    # Up to rounding: the sums of BLAS in PETSc's vectors depend on the alignment of their memory.
    assert figures["value"] == pytest.approx(whole["value"], rel=1e-12)
    assert figures["iterations"] == whole["iterations"]
    assert 0 < figures["evaluations"] < whole["evaluations"]
    again, _ = invert(capfd, config, "--resume", "auto")
    assert (again["value"], again["evaluations"]) == (figures["value"], 0)
    changed = "inverse.noise=0.1"
    refused = complaint(capfd, config, "--run-dir", run, "--resume", "auto", "--set", changed)
    assert refused == (f"[inverse] noise = 0.1: must stay 0.05 to go on in {run}; --overwrite begins a new run")
    assert "is not empty" in complaint(capfd, config, "--run-dir", run)
    assert "must be one of them" in complaint(capfd, config, "--run-dir", run, "--resume", "auto", "--overwrite")


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
@pytest.mark.nightly
def test_newton_s_method_needs_fewer_iterations(config: Path, capfd: Capture, hessian: str) -> None:
    exactly = ("--set", "inverse.reduction=1e-6", "--set", "inverse.iterations=500")
    newton, _ = invert(capfd, config, *exactly, "--set", "inverse.method=bntr", "--set", f"inverse.hessian={hessian}")
    assert newton["products"] > 0
    quasi, _ = invert(capfd, config, "--overwrite", *exactly)
    assert newton["iterations"] < quasi["iterations"]
    assert newton["value"] == pytest.approx(quasi["value"], rel=1e-9)


@pytest.mark.slow
def test_the_largest_number_of_iterations_ends_an_inversion_without_failure(config: Path, capfd: Capture) -> None:
    figures, err = invert(capfd, config, "--set", "inverse.iterations=1")
    assert figures["iterations"] == 1
    assert err.splitlines()[-1] == (
        "pnode-dist: after 1 iterations not converged: the largest number of iterations is reached"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("inverse.evry=2", "[inverse] unknown key evry (did you mean every?)"),
        ("inverse.method=newton", "[inverse] method"),
        ("inverse.hessian=exact", 'must be left out with method = "blmvm", which needs no Hessian'),
        ("inverse.members=4", "must be 0, or at least 2 with eigenvalues above 0"),
        ("inverse.petsc_options.tao_max_it=3", "tao_max_it must be left out: set iterations"),
        ("inverse.observed=3", "[inverse] observed = 3: must be at most 2, one less than [problem] times"),
        ("inverse.every=11", "[inverse] every = 11: must be at most 10, the points of the shorter axis"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(config: Path, capfd: Capture, override: str, line: str) -> None:
    assert line in complaint(capfd, config, "--set", override)
    assert not (config.parent / "runs").exists()


def test_a_problem_that_inverts_for_nothing_is_refused_by_name(tmp_path: Path, capfd: Capture) -> None:
    path = tmp_path / "swing.toml"
    path.write_text(plain_pendulum.config().to_toml())
    assert complaint(capfd, path).startswith("pendulum: invert needs a problem that defines inverse and InverseConfig")


def test_the_methods_of_a_configuration_are_those_of_tao() -> None:
    assert get_args(TaoMethod) == tuple(METHODS)
