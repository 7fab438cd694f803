"""A training run that is killed again and again ends with the very parameters of one that never was.

PNODE_DIST_KILLS says how often; each takes a second or two.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pnode_dist.runs import snapshot_files
from pnode_dist.system.scratch import PrivateDirectory
from tests.conftest import PATIENCE, ROOT
from tests.faults.killed_rank import KILLED, NONE, SUM
from tests.unit.problems.field.synthetic_fields import config, dataset, values, write

KILLS = int(os.environ.get("PNODE_DIST_KILLS", "10"))
PER_EPOCH = 6  # of 21 windows in batches of 4


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Steps enough for all kills, checkpoints on disk, and a snapshot whenever the disk is free."""
    return configured(tmp_path, 2 + KILLS)


def configured(tmp_path: Path, epochs: int) -> Path:
    (tmp_path / "spill").mkdir()
    tables: dict[str, Any] = {
        "run": {"name": "killed"},
        "training": {"epochs": epochs, "validate_every": 2, "keep": "best", "schedule": "cosine"},
        "trajectory": {"ram_slots": 1, "disk_slots": 2, "directory": str(tmp_path / "spill")},
        "snapshot": {"every_steps": 1},
    }
    path = tmp_path / "killed.toml"
    path.write_text(config(write(tmp_path / "sst.nc", dataset(values())), **tables).to_toml())
    return path


def end_of(run: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = ("kind", "step", "epoch", "loss", "learning_rate", "gradient_norm", "figures")
    return torch.load(run / "model.pt", weights_only=True), [[record.get(key) for key in told] for record in records]


def assert_alike(run: Path, whole: Path) -> None:
    (parameters, records), (expected, expected_records) = end_of(run), end_of(whole)
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert records == expected_records
    assert not (run / "lock.json").exists()
    assert json.loads((run / "heartbeat.json").read_text())["state"] == "finished"
    assert not list(run.rglob(".*"))


def train(config_file: Path, run: Path) -> None:
    command = [sys.executable, "-m", "pnode_dist.cli.main", "train", str(config_file), "--run-dir", str(run)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE + 30 * KILLS)


@pytest.mark.nightly  # the first phase in which a rank is killed stands for them
@pytest.mark.timeout(600 + 100 * KILLS)
def test_random_kills_change_nothing_and_leave_nothing(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_file, tmp_path / "whole")

    lives = [sys.executable, str(Path(__file__).with_name("lives.py")), str(config_file), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*lives, str(KILLS), "7"], env=environment, capture_output=True, text=True, check=False)

    log = (tmp_path / "run.log").read_text()
    assert ended.returncode == 0, ended.stderr + log
    assert_alike(tmp_path / "run", tmp_path / "whole")
    # Making a directory removes what processes that are gone have left, once it is old enough. The last life ends
    # without the interpreter's exit, so its own may be there and young.
    monkeypatch.setattr("pnode_dist.system.scratch._GRACE", -1.0)
    PrivateDirectory(tmp_path / "spill").remove()
    assert not list((tmp_path / "spill").iterdir())


def children_of(launcher: int) -> list[int]:
    """All processes below the launcher."""
    found, parents = [], [launcher]
    while parents:
        parent = parents.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            below = [int(number) for number in task.read_text().split()]
            found += below
            parents += below
    return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("phases", [(SUM,), pytest.param(tuple(KILLED), id="all", marks=pytest.mark.nightly)])
def test_a_rank_killed_in_any_phase_ends_all_and_the_run_resumes_to_the_same_end(
    phases: tuple[str, ...], tmp_path: Path
) -> None:
    config_file = configured(tmp_path, 2 + len(phases) // 2)
    whole, run = tmp_path / "whole", tmp_path / "run"
    ended = train_two(NONE, config_file, whole)
    assert ended.code == 0, ended.said

    for phase in phases:
        rank, before = KILLED[phase], max(snapshot_files.steps_in(run), default=0)
        ended = train_two(phase, config_file, run)
        assert ended.code != 0, f"{phase}: {ended.said}"
        assert run.with_suffix(".died").exists()
        run.with_suffix(".died").unlink()
        # The launcher knows the process and its host, and the run which rank it was.
        process = json.loads((run / "versions.json").read_text())["processes"][rank]
        assert f"PID {process} RUNNING AT {socket.gethostname()}" in ended.said, ended.said
        assert "Killed (signal 9)" in ended.said
        last = snapshot_files.steps_in(run)[0]
        assert last == before + 1
        snapshot_files.check(snapshot_files.path_of(run, last))

    ended = train_two(NONE, config_file, run)
    assert ended.code == 0, ended.said
    assert f"going on after step {last}" in ended.said
    assert_alike(run, whole)
    assert not list((tmp_path / "spill").iterdir())


@dataclass(frozen=True)
class Ended:
    code: int
    said: str


def train_two(phase: str, config_file: Path, run: Path) -> Ended:
    """A training on two ranks, of which one may be killed in that phase. No process of it is left."""
    program = [sys.executable, str(Path(__file__).with_name("killed_rank.py")), phase, str(config_file), str(run)]
    launcher = subprocess.Popen(
        [str(ROOT / "launch" / "mpirun.sh"), "-n", "2", *program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    processes: set[int] = set()
    while launcher.poll() is None:
        processes.update(children_of(launcher.pid))
        time.sleep(0.1)
    assert len(processes) >= 3
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    return Ended(launcher.returncode, launcher.communicate(timeout=PATIENCE)[0])
