"""Hosts, and the file system that they share, may have different clocks: what is dead and what is alive stays so."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import pytest

from pnode_dist.runs import heartbeat
from pnode_dist.runs import lock as run_lock
from pnode_dist.runs.lock import LOCK, RunLock, is_alive, this_process
from pnode_dist.runs.status import status_of
from pnode_dist.system import scratch
from pnode_dist.system.scratch import PrivateDirectory

DAY = 86_400.0
TICK = 0.02  # seconds by which the times of files, taken at a tick of the kernel, may be behind the clock


@pytest.fixture(params=[-DAY, DAY], ids=["a day slow", "a day fast"])
def other_clock(request, monkeypatch):
    """Sets this host's clock wrong, or right again. File systems go on by theirs."""
    right = time.time

    def use(wrong=True):
        monkeypatch.setattr(time, "time", lambda: right() + wrong * request.param)

    return use


def test_idle_time_is_told_where_the_run_has_another_clock(other_clock, mesh, tmp_path):
    (tmp_path / "config.toml").write_text('[run]\nname = "test"\n')
    other_clock()
    lock = RunLock(tmp_path)
    # One sign of life alone: entered, it would give more of them, from a thread that has the clocks change under it.
    beating = heartbeat.of_run(tmp_path, lock, mesh, epochs=10)
    beating.update(step=30, stepped=time.time() - 3)
    beating._write()
    other_clock(wrong=False)
    assert 3 - TICK <= status_of(tmp_path).idle_seconds < DAY / 2
    # The run has not given a sign of life for two minutes.
    old = time.time() - 120
    os.utime(tmp_path / heartbeat.HEARTBEAT, (old, old))
    assert 123 - TICK <= status_of(tmp_path).idle_seconds < DAY / 2
    lock.release()


def test_the_lease_of_a_lock_is_measured_by_the_file_system(other_clock, tmp_path):
    holder = dataclasses.replace(this_process(), host="elsewhere", boot="another")
    path = tmp_path / LOCK
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    now = path.stat().st_mtime
    other_clock()

    assert is_alive(tmp_path, holder)
    os.utime(path, (now - run_lock.LEASE - 5,) * 2)
    assert not is_alive(tmp_path, holder)


def test_leftovers_of_killed_processes_are_removed_and_what_was_just_made_is_not(other_clock, tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{scratch.prefix()}{name}").mkdir()
    long_ago = time.time() - scratch._GRACE - 5
    os.utime(tmp_path / f"{scratch.prefix()}old", (long_ago, long_ago))
    other_clock()

    PrivateDirectory(tmp_path).remove()

    assert [path.name for path in tmp_path.iterdir()] == [f"{scratch.prefix()}new"]
