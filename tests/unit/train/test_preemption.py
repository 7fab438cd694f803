"""A run that is asked to stop leaves a snapshot at once, and ends as it would have when it is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import datetime

import pytest

from pnode_dist.config.tables import SnapshotConfig
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.endings import Preempted
from pnode_dist.system import slurm
from pnode_dist.train import loop
from pnode_dist.train.preemption import Preemption

NEVER = SnapshotConfig(every_steps=0, every_minutes=0)


def asking(problem, number, at):
    """A problem that sends this process a signal in the loss of step `at`, before its solve."""
    honest, calls = problem.loss, []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return honest(model, batch)

    problem.loss = loss
    return problem


def train(problem, training, mesh, directory, preemption=None, start=None):
    directory.mkdir(exist_ok=True)
    snapshot = None if start is None else snapshot_files.load(snapshot_files.path_of(directory, start))
    return loop.train(problem, training, mesh, directory, NEVER, snapshot, "", preemption)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_and_it_is_gone_on_with_to_the_same_end(decay, mesh, training, tmp_path, number):
    train(decay, training, mesh, tmp_path / "whole")
    before = signal.getsignal(number)

    with Preemption(mesh) as preemption, pytest.raises(Preempted, match=rf"{number.name} on rank 0 \(") as caught:
        train(asking(type(decay)(mesh), number, 3), training, mesh, tmp_path / "run", preemption)

    assert signal.getsignal(number) == before
    (step,) = snapshot_files.steps_in(tmp_path / "run")
    assert str(caught.value).startswith(f"stopped after step {step}, in epoch ")
    # The step was given up within its solve, or carried out, as was the next one, which tells the other ranks.
    assert step in (2, 3, 4)
    again = type(decay)(mesh)
    train(again, training, mesh, tmp_path / "run", start=step)
    assert again.rate == decay.rate


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_long_solve_is_given_up_and_the_run_is_as_before_it(decay, mesh, training, tmp_path, adaptive):
    problem = asking(type(decay)(mesh), signal.SIGTERM, 2)
    honest = problem.loss

    def loss(model, batch):
        if len(problem.rates) == 1:
            # A million steps. Carried out, they would be step 2 of the training.
            decay_solve.step_size = 1e-6
            if adaptive:
                decay_solve.rtol, decay_solve.options = 1e-3, {"ts_adapt_dt_max": 1e-6}
        problem.rates.append(problem.rate)
        return honest(model, batch)

    decay_solve, problem.rates, problem.loss = problem.model, [], loss
    decay_solve.trajectory = None
    with Preemption(mesh) as preemption, pytest.raises(Preempted, match=r"^stopped after step 1, in epoch 1 of 4: SIG"):
        train(problem, training, mesh, tmp_path, preemption)

    assert problem.rate == problem.rates[1]
    assert snapshot_files.steps_in(tmp_path) == [1]


def test_a_request_during_validation_leaves_it_to_be_done(decay, mesh, training, tmp_path):
    train(decay, training, mesh, tmp_path / "whole")
    problem = type(decay)(mesh)
    honest = problem.validation

    def validation(model):
        os.kill(os.getpid(), signal.SIGTERM)
        model.step_size = 1e-5
        model(next(problem.batches(1)), [0.0, 1.0])
        return honest(model)

    problem.validation = validation
    with Preemption(mesh) as preemption, pytest.raises(Preempted, match="after step 8, in epoch 4 of 4"):
        train(problem, training, mesh, tmp_path / "run", preemption)

    again = type(decay)(mesh)
    outcome = train(again, training, mesh, tmp_path / "run", start=8)
    assert outcome.figures == {"rate_error": abs(decay.rate + 0.7), "rate": decay.rate}


def test_the_end_of_the_jobs_time_stops_the_run(decay, mesh, training, tmp_path):
    with (
        Preemption(mesh, time.time() - 1) as preemption,
        pytest.raises(Preempted, match="the end of the job's time on rank 0"),
    ):
        train(decay, training, mesh, tmp_path, preemption)


# When a Slurm job ends


def test_slurm_says_when_the_job_ends():
    assert slurm.job_end({}) is None
    assert slurm.job_end({"SLURM_JOB_ID": "12", "SLURM_JOB_END_TIME": "1790000000"}) == 1790000000.0


@pytest.mark.parametrize(("end", "known"), [("2026-11-26T03:04:05", True), ("Unknown", False)])
def test_scontrol_is_asked_where_the_environment_does_not_say(monkeypatch, end, known):
    def scontrol(command, **options):
        assert command == ["scontrol", "--oneliner", "show", "job", "12"]
        return subprocess.CompletedProcess(command, 0, f"JobId=12 TimeLimit=00:10:00 EndTime={end} Deadline=N/A\n", "")

    monkeypatch.setattr(subprocess, "run", scontrol)
    expected = datetime(2026, 11, 26, 3, 4, 5).timestamp() if known else None
    assert slurm.job_end({"SLURM_JOB_ID": "12"}) == expected


def test_a_job_is_no_worse_off_without_scontrol(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert slurm.job_end({"SLURM_JOB_ID": "12"}) is None
