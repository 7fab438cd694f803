"""What `pnode-dist status` says of a run, alive and dead."""

from __future__ import annotations

import json
import time

import pytest

from pnode_dist.cli.main import main
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import heartbeat
from pnode_dist.runs.endings import Preempted
from pnode_dist.runs.lock import RunLock
from pnode_dist.runs.status import follow, in_words, status_of, with_units

CONFIG = '[run]\nname = "test"\n[trajectory]\nram = "1MiB"\ndisk = "2MiB"\n'


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    return tmp_path


def test_a_finished_run_is_known_by_its_directory(config_file, tmp_path, capfd):
    assert main(["train", str(config_file)]) == 0
    capfd.readouterr()

    assert main(["status", str(tmp_path / "run"), "--json"]) == 0

    found = json.loads(capfd.readouterr().out)
    assert (found["state"], found["step"], found["epoch"], found["progress"]) == ("finished", 12, "2/2", 1.0)
    assert found["ranks"] == "1 (state 1 x data 1) on 1 host(s)"
    assert found["last_snapshot"].startswith("step 12, ")
    assert found["peak_memory"] > 10 * 2**20
    assert not (tmp_path / "run" / "lock.json").exists()

    # A resumed run that has nothing left to do is where it was.
    assert main(["train", str(config_file), "--resume", "auto"]) == 0
    again = status_of(tmp_path / "run")
    assert (again.state, again.step, again.epoch, again.progress) == ("finished", 12, "2/2", 1.0)
    assert again.loss is not None


def test_a_run_under_way_tells_its_rate_and_the_time_left(run, mesh):
    lock = RunLock(run)
    with heartbeat.of_run(run, lock, mesh, epochs=10) as beating:
        beating.update(step=30, epoch=4, epoch_steps=10, steps_per_second=2.0, stepped=time.time() - 3, loss=0.5)
        beating._write()
        status = status_of(run)

        assert (status.state, status.progress, status.seconds_left) == ("running", 0.3, 35.0)
        assert 3 <= status.idle_seconds < 3600
        assert status.budget == "1MiB memory, 2MiB disk per rank"
        assert in_words(status) == "running  step 30, epoch 4/10, 30.0 %  loss 0.5  2 steps/s  35 s left"
    lock.release()
    assert status_of(run).state == "finished"


def test_people_are_told_units(run, mesh, capfd):
    (run / "snapshots").mkdir()
    label = {"step": 20, "saved": "2026-01-01", "bytes": 3 * 2**19}
    (run / "snapshots" / "step-20.json").write_text(json.dumps(label))
    with heartbeat.of_run(run, RunLock(run), mesh, epochs=10) as beating:
        beating.update(
            step=30, epoch=4, epoch_steps=1000, steps_per_second=2.0, stepped=time.time(), loss=0.123456789,
            bytes_spilt=2**30, peak_memory=3 * 2**20,
        )  # fmt: skip
        beating._write()
        shown = with_units(status_of(run))
        assert main(["status", str(run), "--json"]) == 0
        plain = json.loads(capfd.readouterr().out)

    assert (shown["progress"], shown["loss"], shown["rate"]) == ("0.3 %", "0.123457", "2 steps/s")
    assert shown["time left"] == "1 h 23 min"
    assert shown["since last step"].endswith(" s")
    assert shown["last_snapshot"] == "step 20, 2026-01-01, 1.5 MiB"
    assert (shown["spilt"], shown["peak_memory"]) == ("1.0 GiB of all ranks", "3.0 MiB of all ranks")
    assert (plain["progress"], plain["seconds_left"], plain["spilt"]) == (0.003, 4985.0, 2**30)
    assert plain["last_snapshot"] == "step 20, 2026-01-01, 1572864 bytes"


def test_a_run_whose_process_is_gone_is_dead(run, mesh):
    with heartbeat.of_run(run, RunLock(run), mesh, epochs=10) as beating:
        beating._write()
        beat = (run / "heartbeat.json").read_text()
    (run / "heartbeat.json").write_text(beat)
    (run / "lock.json").unlink()

    assert status_of(run).state == "dead"


@pytest.mark.parametrize(("error", "state"), [(Preempted("stopped"), "preempted"), (RuntimeError("broken"), "failed")])
def test_how_a_run_ended_stays(run, mesh, error, state):
    with pytest.raises(type(error)), heartbeat.of_run(run, RunLock(run), mesh, epochs=10):
        raise error

    status = status_of(run)
    assert (status.state, status.message) == (state, str(error))


def test_a_run_that_was_not_begun_and_none_at_all(run, tmp_path):
    assert status_of(run).state == "no sign of life"
    with pytest.raises(ConfigurationError, match="there is no run in this directory"):
        status_of(tmp_path / "nowhere")


def test_a_run_is_followed_to_its_end(run, mesh):
    with heartbeat.of_run(run, RunLock(run), mesh, epochs=10) as beating:
        beating._write()
        following = follow(run, every=0.01)
        assert next(following).state == "running"
        beating.update(step=1)
        beating._write()
        assert next(following).step == 1
    assert [status.state for status in following] == ["finished"]


def test_two_runs_do_not_write_into_one_directory(config_file, tmp_path, capfd, mesh):
    with run_directory.held(tmp_path / "run", mesh):
        assert main(["train", str(config_file)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"run directory {tmp_path / 'run'}: is in use by process " in line
