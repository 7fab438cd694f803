"""The jobs in slurm/ run as they are on a real Slurm: to the end, again until it is reached, and side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cluster.namespaces import wait_until
from tests.cluster.slurm import Slurm
from tests.conftest import ROOT

pytestmark = pytest.mark.cluster

# A problem of a user's own: the scripts need no edit for it.
CONFIG = "examples/own_problem/mine.toml"
# Nothing here takes that long unless the machine has much else to do.
SLOWLY = 900.0
ONE_RANK_A_NODE = ("--nodes=2", "--ntasks-per-node=1")
_SMALL = {
    "problem.points": "8",
    "problem.trajectories": "3",
    "problem.validation": "1",
    "training.batch_size": "4",
    "evaluation.leads": "[1,5]",
}


def settings(**more: str) -> list[str]:
    """Arguments that make the problem small."""
    return [part for name, value in {**_SMALL, **more}.items() for part in ("--set", f"{name}={value}")]


def test_the_gradient_on_two_nodes_is_that_of_one_rank(slurm: Slurm) -> None:
    job = slurm.submit("gradcheck.sbatch", CONFIG, *settings(), "--json", options=ONE_RANK_A_NODE)
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=SLOWLY)
    assert slurm.about(job)["JobState"] == "COMPLETED", slurm.output(job)
    alone = slurm.run(
        "launch/mpirun.sh", "-n", "1", "pnode-dist", "gradcheck", CONFIG, *settings(), "--json", timeout=SLOWLY
    )
    on_two, on_one = (json.loads(text.splitlines()[-1]) for text in (slurm.output(job), alone.stdout))
    assert slurm.about(job)["NodeList"] == "node[1-2]"
    assert on_two["failures"] == on_one["failures"] == []
    for figure in ("loss", "gradient_norm", "adjoint_derivative"):
        assert on_two[figure] == pytest.approx(on_one[figure], rel=1e-12)


def losses(run: Path) -> dict[int, float]:
    """The loss at each optimiser step of a run; the last one where a step was done again."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def parameters(run: Path) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = torch.load(run / "model.pt", weights_only=True)
    return saved


def train(slurm: Slurm, run: Path, *options: str, epochs: int = 16, **more: str) -> str:
    """Submit a training over both nodes."""
    often = {"training.log_every": "1", "snapshot.every_steps": "3"}
    small = settings(**{**often, "training.epochs": str(epochs), **more})
    return slurm.submit("train.sbatch", CONFIG, *small, "--run-dir", str(run), options=(*ONE_RANK_A_NODE, *options))


def wait_for_steps(slurm: Slurm, job: str, run: Path, steps: int) -> None:
    try:
        wait_until(lambda: max(losses(run), default=0) >= steps, SLOWLY, f"step {steps} of job {job}")
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {slurm.about(job)}\n{slurm.output(job)}") from None


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a training that nothing has stopped."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    job = train(slurm, run)
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=SLOWLY)
    assert slurm.about(job)["JobState"] == "COMPLETED", slurm.output(job)
    assert f"next: pnode-dist evaluate {run}" in slurm.output(job)
    return run


def assert_as_if_undisturbed(slurm: Slurm, job: str, run: Path, undisturbed: Path) -> None:
    slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=SLOWLY)
    assert slurm.about(job)["JobState"] == "COMPLETED", slurm.output(job)
    assert losses(run) == losses(undisturbed)
    ended, meant = parameters(run), parameters(undisturbed)
    assert ended.keys() == meant.keys()
    assert all(torch.equal(ended[name], meant[name]) for name in meant)


@pytest.mark.nightly  # beside the one that is requeued
def test_a_cancelled_training_goes_on_when_it_is_submitted_again(
    slurm: Slurm, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = train(slurm, run)
    wait_for_steps(slurm, job, run, 5)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED", seconds=SLOWLY)
    assert max(losses(run)) < max(losses(undisturbed))
    again = train(slurm, run)
    assert_as_if_undisturbed(slurm, again, run, undisturbed)
    assert slurm.about(again)["Restarts"] == "0"


def test_a_requeued_training_goes_on(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = train(slurm, run)
    wait_for_steps(slurm, job, run, 5)
    slurm.run("scontrol", "requeue", job)
    assert_as_if_undisturbed(slurm, job, run, undisturbed)
    assert slurm.about(job)["Restarts"] == "1"


@pytest.mark.nightly
def test_a_training_whose_node_fails_goes_on_once_there_is_one(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = train(slurm, run)
    wait_for_steps(slurm, job, run, 5)
    slurm.nodes["node2"].stop()
    slurm.wait_for(job, "PENDING", seconds=SLOWLY)
    slurm.boot_node("node2")
    assert_as_if_undisturbed(slurm, job, run, undisturbed)
    assert slurm.about(job)["Restarts"] == "1"


def test_the_tasks_of_an_array_train_the_variants_of_a_file(slurm: Slurm, tmp_path: Path) -> None:
    variants = tmp_path / "variants"
    lines = [settings(**{"training.epochs": "1", "run.seed": str(seed)}) for seed in (5, 6)]
    variants.write_text("".join(f"{' '.join(line)}\n" for line in lines))
    job = slurm.submit(
        "sweep.sbatch", CONFIG, str(variants), options=("--array=1-3", "--nodes=1", "--ntasks-per-node=1")
    )
    runs = ROOT / "runs" / f"sweep-{job}"
    try:
        for task in (1, 2):
            slurm.wait_for(f"{job}_{task}", "COMPLETED", "FAILED", seconds=SLOWLY)
            assert slurm.about(f"{job}_{task}")["JobState"] == "COMPLETED", slurm.output(job, task)
            assert f"seed = {4 + task}\n" in (runs / str(task) / "config.toml").read_text()
        slurm.wait_for(f"{job}_3", "FAILED", seconds=SLOWLY)
        assert slurm.output(job, 3) == f"sweep.sbatch: {variants} has 2 lines, and none for task 3\n"
    finally:
        shutil.rmtree(runs, ignore_errors=True)


# The one that stops first is looked at first: until then it trains again and again.
STOPS = {
    "end time": (("--signal=CONT@1",), {"run.stop_before_end": "60"}, "the end of the job's time"),
    "signal": (("--signal=USR1@20",), {"run.stop_before_end": "0"}, "SIGUSR1"),
}


@pytest.fixture(scope="module")
def stopping(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """Trainings that do not end within their time, side by side: job and run directory."""
    jobs = {}
    for name, (options, more, _) in STOPS.items():
        run = tmp_path_factory.mktemp("stopping") / "run"
        # Slurm sends its signals up to a minute early; by then the ranks have begun, also on a slow machine.
        jobs[name] = train(slurm, run, "--time=4", *options, epochs=100_000, **more), run
    return jobs


@pytest.mark.nightly
@pytest.mark.parametrize("how", STOPS)
def test_a_training_stops_before_its_time_and_goes_on_in_the_next_run_of_the_job(
    slurm: Slurm, stopping: dict[str, tuple[str, Path]], how: str
) -> None:
    job, run = stopping[how]
    slurm.wait_for_output(job, r"has stopped in time and is queued again \(restart 1\)", SLOWLY)
    before = max(losses(run), default=0)
    assert STOPS[how][2] in slurm.output(job)
    wait_for_steps(slurm, job, run, before + 2)
    assert int(slurm.about(job)["Restarts"]) >= 1
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED", seconds=SLOWLY)


def test_nodes_train_replicas_of_a_state(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (CONFIG, *settings(**{"training.epochs": "1"}), "--run-dir", str(run))
    job = slurm.submit("multinode.sbatch", *arguments, options=ONE_RANK_A_NODE)
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=SLOWLY)
    assert slurm.about(job)["JobState"] == "COMPLETED", slurm.output(job)
    assert "2 ranks, which see each other; nothing is wrong" in slurm.output(job)
    assert "[mesh]\nstate = 1\ndata = 2\n" in (run / "config.toml").read_text()
