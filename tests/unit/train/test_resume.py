"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

from __future__ import annotations

import json
import math
import random
import shutil
import threading

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist.config.tables import SnapshotConfig
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.config import FieldRun
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.endings import RunDirectoryError
from pnode_dist.runs.resume import MAY_CHANGE, choose_start
from pnode_dist.train import loop
from tests.conftest import PATIENCE

EVERY_STEP = SnapshotConfig(every_steps=1, every_minutes=0, keep=100)


class KilledError(Exception):
    """What ends a run at once."""


class Statistics(nn.Module):
    """A mean that follows what it sees, as batch norm's does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("constant", torch.ones(3))


def noisy(problem, stop_at=None):
    """A loss that draws from all generators and follows a running mean, and ends the run in step number `stop_at`."""
    honest, problem.calls = problem.loss, 0
    problem.model.statistics = Statistics()

    def loss(model, batch):
        problem.calls += 1
        if problem.calls == stop_at:
            raise KilledError
        problem.model.statistics.mean.lerp_(batch.mean() * torch.rand(1, dtype=torch.float64), 0.1)
        draws = torch.rand(()).item() + np.random.random() + random.random() + random.gauss(0, 1)
        return honest(model, batch) * (1 + 0.1 * draws + 0.01 * problem.model.statistics.mean.item())

    problem.loss = loss
    return problem


def seeded():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def records(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("wall_time", "peak_memory")} for line in lines]


def train(problem, training, mesh, directory, start=None):
    directory.mkdir(exist_ok=True)
    snapshot = None
    if start is not None:
        snapshot = snapshot_files.load(snapshot_files.path_of(directory, start))
        with (directory / "metrics.jsonl").open("ab") as file:
            file.truncate(snapshot.position.metrics)
    return loop.train(problem, training, mesh, directory, EVERY_STEP, snapshot)


@pytest.mark.parametrize("settings", [{}, {"keep": "best", "schedule": "cosine", "gradient_clip": 0.5}])
def test_a_run_killed_in_any_step_is_resumed_to_the_very_same_bits(
    decay, mesh, training, tmp_path, every_snapshot, settings
):
    training = training.model_copy(update={"learning_rate": 0.3, "validate_every": 1, **settings})
    seeded()
    whole = train(noisy(decay), training, mesh, tmp_path / "whole")
    steps = whole.steps

    for killed_in in range(2, steps + 1):
        directory = tmp_path / f"killed{killed_in}"
        seeded()
        with pytest.raises(KilledError):
            train(noisy(type(decay)(mesh), killed_in), training, mesh, directory)
        torch.manual_seed(99)
        resumed = noisy(type(decay)(mesh))
        outcome = train(resumed, training, mesh, directory, killed_in - 1)

        assert resumed.rate == decay.rate
        assert torch.equal(resumed.model.statistics.mean, decay.model.statistics.mean)
        assert (outcome.steps, outcome.loss, outcome.kept_epoch) == (whole.steps, whole.loss, whole.kept_epoch)
        assert outcome.figures == whole.figures
        assert records(directory) == records(tmp_path / "whole")


def test_buffers_that_training_does_not_change_are_not_kept(decay, mesh, training, tmp_path):
    train(noisy(decay), training, mesh, tmp_path)

    snapshot = snapshot_files.load(snapshot_files.path_of(tmp_path, snapshot_files.steps_in(tmp_path)[0]))
    assert snapshot.ranks[0].buffers.keys() == {"statistics.mean"}


def test_a_longer_run_goes_on_from_the_end_with_the_longer_schedule(decay, mesh, training, tmp_path):
    short = training.model_copy(update={"schedule": "cosine"})
    train(decay, short, mesh, tmp_path)

    outcome = train(type(decay)(mesh), short.model_copy(update={"epochs": 6}), mesh, tmp_path, 8)

    rates = [record["learning_rate"] for record in records(tmp_path) if record["kind"] == "step"]
    assert outcome.steps == len(rates) == 12
    for epoch, rate in enumerate(rates[8::2], 4):
        assert rate == pytest.approx(0.05 * (1 + math.cos(math.pi * epoch / 6)) / 2)


def test_a_run_that_has_ended_keeps_its_outcome(decay, mesh, training, tmp_path):
    whole = train(decay, training, mesh, tmp_path)

    again = train(type(decay)(mesh), training, mesh, tmp_path, 8)

    assert (again.steps, again.loss, again.figures) == (whole.steps, whole.loss, whole.figures)


def test_training_does_not_wait_for_a_slow_disk(decay, mesh, training, tmp_path, monkeypatch):
    written, go_on, write = [], threading.Event(), snapshot_files.write

    def slow(directory, snapshot, *rest):
        assert go_on.wait(PATIENCE)
        written.append(snapshot.position.step)
        write(directory, snapshot, *rest)

    honest = decay.validation

    def validation(model):
        # All steps have been taken while the first snapshot is being written.
        assert written == []
        go_on.set()
        return honest(model)

    monkeypatch.setattr(snapshot_files, "write", slow)
    decay.validation = validation
    train(decay, training, mesh, tmp_path)

    # The others were not due while the disk was busy; that of the end is always written.
    assert written == [1, 8]


def test_a_full_disk_ends_the_run_with_one_line_that_names_the_last_snapshot(
    decay, mesh, training, tmp_path, every_snapshot, monkeypatch
):
    write = snapshot_files.write

    def full(directory, snapshot, *rest):
        if snapshot.position.step == 3:
            raise OSError(28, "No space left on device")
        write(directory, snapshot, *rest)

    monkeypatch.setattr(snapshot_files, "write", full)
    said = "cannot write the snapshot: No space left on device; the last snapshot is that of step 2"
    with pytest.raises(RunDirectoryError, match=f"^run directory {tmp_path}: {said}$"):
        train(decay, training, mesh, tmp_path)

    snapshot_files.check(snapshot_files.path_of(tmp_path, 2))


def test_metrics_that_cannot_be_written_end_the_run_as_well(decay, mesh, training, tmp_path, monkeypatch):
    from pnode_dist.runs.metrics import MetricsFile

    def full(metrics, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "write", full)
    with pytest.raises(RunDirectoryError, match="cannot write the metrics: No space left on device; there is no snap"):
        train(decay, training, mesh, tmp_path)


# Which snapshot a run goes on from


def config(directory, **tables):
    whole = {
        "run": {"name": "test", "directory": str(directory)},
        "problem": {"path": "sst.nc", "variable": "sst", "validation": 3, "window": 2},
        "training": {"epochs": 4},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return FieldRun.model_validate(whole)


@pytest.fixture
def run(decay, mesh, training, tmp_path, every_snapshot):
    """The directory of a run with snapshots of the steps 1 to 8."""
    directory = tmp_path / "run"
    text = config(directory).to_toml()
    directory.mkdir()
    (directory / "config.toml").write_text(text)
    loop.train(decay, training, mesh, directory, EVERY_STEP, None, text)
    return directory


def damage(directory, step):
    path = snapshot_files.path_of(directory, step)
    path.write_bytes(path.read_bytes()[:-3])


def test_a_new_directory_is_begun_in_and_one_with_something_else_in_it_is_not(tmp_path):
    for choice in ("no", "auto"):
        start = choose_start(choice, config(tmp_path / "new"), overwrite=False)
        assert (start.snapshot, start.replaces) == (None, False)
    (tmp_path / "notes.txt").write_text("mine")
    for choice in ("no", "auto"):
        with pytest.raises(ConfigurationError, match="is not empty"):
            choose_start(choice, config(tmp_path), overwrite=False)


def test_a_run_that_was_ended_before_its_first_snapshot_is_begun_anew(tmp_path):
    (tmp_path / "config.toml").write_text("")

    assert choose_start("auto", config(tmp_path), overwrite=False).replaces


def test_the_last_snapshot_is_used_and_damaged_ones_are_passed_over_in_one_line(run):
    assert choose_start("auto", config(run), overwrite=False).snapshot == snapshot_files.path_of(run, 8)
    damage(run, 8)
    damage(run, 7)

    start = choose_start("auto", config(run), overwrite=False)

    assert start.snapshot == snapshot_files.path_of(run, 6)
    (note,) = start.notes
    assert note.startswith(f"{snapshot_files.path_of(run, 8)} is damaged: ")
    assert note.endswith(": using that of step 6")


def test_without_a_snapshot_that_is_whole_the_run_is_begun_anew_and_says_so(run):
    for step in range(1, 9):
        damage(run, step)

    start = choose_start("auto", config(run), overwrite=False)

    assert (start.snapshot, start.replaces) == (None, True)
    assert "there is no other, beginning anew" in start.notes[0]


def test_a_path_is_that_of_a_snapshot_or_of_another_run(run, tmp_path):
    third = snapshot_files.path_of(run, 3)
    assert choose_start(str(third), config(run), overwrite=False).in_place
    elsewhere = choose_start(str(run), config(tmp_path / "other"), overwrite=False)
    assert (elsewhere.snapshot, elsewhere.in_place) == (snapshot_files.path_of(run, 8), False)
    damage(run, 3)
    with pytest.raises(ConfigurationError, match=rf"^--resume {third}: is damaged"):
        choose_start(str(third), config(run), overwrite=False)
    with pytest.raises(ConfigurationError, match=r"^--resume nowhere: is not complete"):
        choose_start("nowhere", config(run), overwrite=False)
    with pytest.raises(ConfigurationError, match="there is no snapshot that is whole"):
        choose_start(str(tmp_path), config(run), overwrite=False)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("training", "learning_rate", 0.5),
        ("training", "batch_size", 2),
        ("run", "seed", 1),
        ("solver", "method", "dopri5"),
        ("solver", "state_dtype", "float64"),
        ("trajectory", "checkpoint_dtype", "float32"),
        ("problem", "variable", "salinity"),
        ("model", "channels", 3),
    ],
)
def test_a_key_that_changes_what_is_computed_is_named(run, table, key, value):
    with pytest.raises(ConfigurationError, match=rf"^\[{table}\] {key} = {value!r}: must stay ") as caught:
        choose_start("auto", config(run, **{table: {key: value}}), overwrite=False)
    assert "\n" not in str(caught.value)


def test_another_problem_is_named(run):
    from pnode_dist.problems.pendulum.config import PendulumRun

    other = PendulumRun.model_validate(
        {
            "run": {"name": "test", "directory": str(run)},
            "problem": {
                "type": "pendulum",
                "trajectories": 2,
                "validation": 1,
                "times": 5,
                "interval": 0.1,
                "window": 2,
            },
            "training": {"epochs": 1},
        }
    )
    with pytest.raises(ConfigurationError, match=r'^\[problem\] type = "pendulum": must be "field"'):
        choose_start("auto", other, overwrite=False)


def test_where_and_for_how_long_a_run_computes_may_change(run):
    moved = run.with_name("moved")
    shutil.move(run, moved)
    changed = config(
        moved,
        mesh={"data": 2},
        trajectory={"ram": "1MiB"},
        training={"epochs": 9, "log_every": 3},
        problem={"path": "/elsewhere/sst.nc"},
        snapshot={"keep": 1},
    )
    assert choose_start("auto", changed, overwrite=False).in_place


def test_every_key_that_may_change_is_one():
    schema = FieldRun.model_json_schema()["$defs"]
    for table, keys in MAY_CHANGE.items():
        name = {"problem": "FieldConfig"}.get(table, f"{table.capitalize()}Config")
        assert keys <= schema[name]["properties"].keys()


def test_overwriting_and_resuming_are_not_both_asked_for(run):
    with pytest.raises(ConfigurationError, match="must be one of them"):
        choose_start("auto", config(run), overwrite=True)


def test_the_directory_is_taken_back_to_the_snapshot(run, mesh):
    snapshot = snapshot_files.load(snapshot_files.path_of(run, 3))
    (run / ".metrics.jsonl.abcdefgh").write_text("")

    run_directory.go_on(run, config(run), mesh, 3, snapshot.position.metrics)

    assert [record["step"] for record in records(run)] == [1, 2, 3]
    assert snapshot_files.steps_in(run) == [3, 2, 1]
    assert not list(run.glob(".*"))
