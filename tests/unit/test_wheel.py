"""The built wheel in an environment of its own, in an empty directory: what users have who see no checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import torch

from tests.conftest import PATIENCE, ROOT

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel, which takes its dependencies from that of the tests."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(ROOT)],
        check=True,
    )
    (wheel,) = directory.glob("*.whl")
    venv.create(directory / "env", with_pip=False)
    target = next((directory / "env/lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    # The paths in such a file are not searched for the .pth file by which the checkout itself is installed.
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = directory / "env/bin"
    (programs / "pnode-dist").write_text(
        f"#!{programs / 'python'}\nimport sys\nfrom pnode_dist.cli.main import main\nsys.exit(main())\n"
    )
    (programs / "pnode-dist").chmod(0o755)
    return programs


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory outside the checkout, with the two files of the example."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "mine.toml"):
        shutil.copy(ROOT / "examples/own_problem" / name, tmp_path)
    return tmp_path


def environment(installed: Path) -> dict[str, str]:
    """The variables under which only the wheel is found."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # The MPI library that the launcher installed lies beside the programs of the tests' own environment.
    library = f"{Path(sys.prefix) / 'lib'}:{kept.get('LD_LIBRARY_PATH', '')}"
    path = f"{installed}:{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "PATH": path, "LD_LIBRARY_PATH": library, "OMP_NUM_THREADS": "1"}


def run(installed: Path, ranks: int, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = [] if ranks == 1 else ["mpirun", "-n", str(ranks)]
    ran = subprocess.run(
        [*launcher, str(installed / "pnode-dist"), *arguments],
        env=environment(installed),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


SPILLING = ("--set", "trajectory.ram_slots=2", "--set", "trajectory.disk=64MiB", "--set", "trajectory.keep=solution")


def losses(directory: str) -> list[float]:
    lines = map(json.loads, Path(directory, "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_the_wheel_is_what_is_imported(installed: Path, empty: Path) -> None:
    found = subprocess.run(
        [str(installed / "python"), "-c", "import pnode_dist; print(pnode_dist.__file__)"],
        env=environment(installed),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(str(installed.parent))


def test_a_configuration_that_is_begun_trains_as_it_is(installed: Path, empty: Path) -> None:
    Path("field.toml").write_text(run(installed, 1, "config", "init", "field").stdout)
    run(installed, 2, "train", "field.toml", "--set", "training.epochs=1")
    assert Path("runs/field/model.pt").is_file()


def test_own_problem_is_stopped_resumed_evaluated_and_checked(installed: Path, empty: Path) -> None:
    often = ("--set", "snapshot.every_steps=1", "--set", "training.epochs=12")
    run(installed, 2, "train", "mine.toml", "--run-dir", "whole", *SPILLING, *often)

    stopped = subprocess.Popen(
        [
            "mpirun",
            "-n",
            "2",
            str(installed / "pnode-dist"),
            "train",
            "mine.toml",
            "--run-dir",
            "cut",
            *SPILLING,
            *often,
        ],
        env=environment(installed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    beat = Path("cut/metrics.jsonl")
    deadline = time.monotonic() + PATIENCE
    while not (beat.exists() and len(beat.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        assert stopped.poll() is None
        time.sleep(0.02)
    (process, *_) = json.loads(Path("cut/versions.json").read_text())["processes"]
    os.kill(process, signal.SIGUSR1)
    _, said = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 75, said
    assert len(losses("cut")) < len(losses("whole"))

    run(installed, 2, "train", "mine.toml", "--run-dir", "cut", "--resume", "auto", *SPILLING, *often)
    assert losses("cut") == losses("whole")
    cut, whole = (torch.load(f"{name}/model.pt", weights_only=True) for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    steps = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert steps[0]["bytes_written"] > 0

    evaluated = json.loads(run(installed, 2, "evaluate", "cut", "--json").stdout)
    assert evaluated["rmse"][0]["model"] < evaluated["rmse"][0]["persistence"]
    assert Path("cut/report.png").stat().st_size > 10_000
    run(installed, 1, "report", "cut")
    assert "reaction_diffusion" in Path("cut/report.html").read_text()
    checked = json.loads(run(installed, 2, "gradcheck", "mine.toml", "--json").stdout)
    assert checked["relative_error"] <= 1e-7
    assert json.loads(run(installed, 1, "status", "cut", "--json").stdout)["state"] == "finished"
    assert run(installed, 1, "plan", "mine.toml").stdout
