"""One run at a time in a directory; one that is dead does not shut out others, on any host."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import lock as run_lock
from pnode_dist.runs.lock import LOCK, RunLock, is_alive, read_holder, this_process
from tests.conftest import ROOT


def left_by(directory, **changes):
    """The lock of another process, that the system does not keep locked."""
    holder = dataclasses.replace(this_process(), **changes)
    (directory / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def test_a_second_run_is_told_who_holds_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock = RunLock(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"is in use by process {os.getpid()} on \S+ \(job 77\)$"):
        RunLock(tmp_path)
    lock.renew()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from pnode_dist.runs.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -9
    assert read_holder(tmp_path) is not None

    RunLock(tmp_path, patience=0).release()

    assert list(tmp_path.iterdir()) == []


def test_on_another_host_a_lock_counts_until_its_lease_is_over(tmp_path):
    holder = left_by(tmp_path, host="elsewhere", boot="another")
    assert is_alive(tmp_path, holder)
    with pytest.raises(ConfigurationError, match="in use by process"):
        RunLock(tmp_path, patience=0)
    long_ago = time.time() - run_lock.LEASE - 5
    os.utime(tmp_path / LOCK, (long_ago, long_ago))

    assert not is_alive(tmp_path, holder)
    RunLock(tmp_path, patience=0).release()


def test_on_another_host_one_waits_whether_the_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_LOOK_AGAIN", 0.01)
    monkeypatch.setattr(run_lock, "LEASE", 0.5)
    holder = left_by(tmp_path, host="elsewhere", boot="another")
    assert not is_alive(tmp_path, holder, patience=5)

    holder = left_by(tmp_path, host="elsewhere", boot="another")
    looked = iter([1.0, time.time(), time.time() + 1])
    monkeypatch.setattr(run_lock, "_renewed", lambda path: next(looked))
    monkeypatch.setattr(run_lock, "clock_of", lambda directory, prefix: 1.2)
    assert is_alive(tmp_path, holder, patience=5)


def test_a_job_that_was_requeued_takes_over_from_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    holder = left_by(tmp_path, host="elsewhere", boot="another")
    assert is_alive(tmp_path, holder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_alive(tmp_path, holder)


def test_without_locks_of_the_system_the_process_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_is_locked", lambda path: None)
    assert is_alive(tmp_path, left_by(tmp_path))
    assert not is_alive(tmp_path, left_by(tmp_path, pid=2**22 + 1))


def test_one_whose_lock_was_taken_learns_of_it(tmp_path):
    lock = RunLock(tmp_path)
    left_by(tmp_path, pid=1)
    with pytest.raises(OSError, match=r"its lock was taken by process 1 on "):
        lock.renew()
    lock.release()
    assert read_holder(tmp_path).pid == 1
    (tmp_path / LOCK).unlink()
    with pytest.raises(OSError, match="not there any more"):
        lock.renew()


def test_setting_a_dead_lock_aside_does_not_take_a_live_one(tmp_path):
    dead = left_by(tmp_path)
    live = left_by(tmp_path)

    run_lock._set_aside(tmp_path / LOCK, dead)

    assert read_holder(tmp_path) == live
