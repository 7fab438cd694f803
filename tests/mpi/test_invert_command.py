"""`pnode-dist invert` on all ranks: one result, and a stop by a signal to any of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist.cli.main import main
from pnode_dist.problems.gray_scott.physics import GrayScott
from pnode_dist.train import preemption
from tests.unit.problems.gray_scott import plain_gray_scott

pytestmark = pytest.mark.mpi

COMM = MPI.COMM_WORLD
SETTINGS = {"every": 3, "observed": 1, "noise": 0.05, "iterations": 5}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that all ranks share, in rank 0's temporary directory."""
    path = Path(COMM.bcast(str(tmp_path))) / "small.toml"
    if COMM.rank == 0:
        shortest: dict[str, Any] = {"problem": {"times": 3, "trajectories": 1}, "evaluation": {"leads": (1, 2)}}
        tables = plain_gray_scott.config(
            run={"name": "small", "directory": str(path.parent / "run")},
            training={"batch_size": 1},
            inverse=SETTINGS,
            **shortest,
        )
        path.write_text(tables.to_toml())
    COMM.barrier()
    return path


def evaluation(config: Path) -> dict[str, Any]:
    COMM.barrier()
    found: dict[str, Any] = json.loads((config.parent / "run/evaluation.json").read_text())
    return found


@pytest.mark.nightly
@pytest.mark.usefixtures("undrawn")
def test_an_inversion_stopped_within_a_solve_goes_on_to_the_same_minimum(
    config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["invert", str(config)]) == 0
    out, err = capfd.readouterr()
    assert [bool(out), bool(err)] == [COMM.rank == 0] * 2
    whole = evaluation(config)
    assert whole["rmse"][1]["analysis"] < whole["rmse"][1]["first_guess"]
    monkeypatch.setattr(preemption, "_SECONDS_BETWEEN_EXCHANGES", 0.0)
    forward, calls = GrayScott.forward, 0

    def interrupted(self: GrayScott, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        # The data are computed without gradients. Two steps of four stages are an evaluation: this is in the third.
        calls += torch.is_grad_enabled()
        if calls == 20 and COMM.rank == COMM.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, t, state)

    with monkeypatch.context() as patch:
        patch.setattr(GrayScott, "forward", interrupted)
        assert main(["invert", str(config), "--overwrite"]) == 75
    assert calls >= 20
    out, err = capfd.readouterr()
    if COMM.rank == 0:
        assert out == ""
        assert f"stopped by SIGTERM on rank {COMM.size - 1}" in err
    recorded = len(list((config.parent / "run/record").glob("evaluation-*.pt")))
    assert recorded >= 1
    assert main(["invert", str(config), "--resume", "auto"]) == 0
    found = evaluation(config)
    assert 0 < found["evaluations"] < whole["evaluations"]
    assert found["value"] == pytest.approx(whole["value"], rel=1e-10)
    assert found["iterations"] == whole["iterations"] == SETTINGS["iterations"]
