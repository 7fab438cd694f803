"""Snapshots on disk: whole or not at all, the last few, and nothing in them is run."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest
import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.rank_state import as_plain, rank_state
from pnode_dist.runs.snapshot import Best, Position, Snapshot
from pnode_dist.runs.snapshot_files import Background, SnapshotError
from tests.conftest import PATIENCE

OWN = as_plain(rank_state(torch.nn.Linear(1, 1), {}))


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        Position(step, 2, (0.5, float("nan")), 1.5, 0.75, {"rmse": 0.1}, 120),
        {"weight": torch.full((3, 2), float(step), dtype=torch.float64)},
        {"weight": {"exp_avg": torch.ones(3, 2), "step": torch.tensor(float(step))}},
        [{"lr": 0.1, "betas": (0.9, 0.999)}],
        None,
        Best(1, {"rmse": 0.2}, {"weight": torch.zeros(3, 2)}),
        [OWN],
        1,
    )


def write(directory: Path, step: int, keep: int = 2) -> Path:
    snapshot_files.write(directory, snapshot(step), "now", "[run]\n", keep)
    return snapshot_files.path_of(directory, step)


def test_what_was_written_comes_back_to_the_last_bit(tmp_path):
    path = write(tmp_path, 7)

    label, found, wanted = snapshot_files.check(path), snapshot_files.load(path), snapshot(7)

    assert (label.step, label.epoch, label.ranks, label.config) == (7, 2, 1, "[run]\n")
    assert repr(found.position) == repr(wanted.position)
    assert torch.equal(found.parameters["weight"], wanted.parameters["weight"])
    assert torch.equal(found.optimiser["weight"]["exp_avg"], wanted.optimiser["weight"]["exp_avg"])
    assert found.groups == wanted.groups
    assert found.best is not None
    assert found.best.figures == {"rmse": 0.2}
    assert torch.equal(found.ranks[0].torch_state, wanted.ranks[0].torch_state)
    assert found.ranks[0].numpy_state == wanted.ranks[0].numpy_state
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_last_few_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 100_000_000):
        write(tmp_path, step)

    assert snapshot_files.steps_in(tmp_path) == [100_000_000, 10]
    assert len(list((tmp_path / "snapshots").iterdir())) == 4


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda content: content[:-1], "is damaged: it has"),
        (
            lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
            "is damaged: its checksum is wrong",
        ),
    ],
)
def test_a_damaged_file_is_recognised(tmp_path, harm, said):
    path = write(tmp_path, 1)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SnapshotError, match=said):
        snapshot_files.check(path)


def test_a_file_without_its_label_does_not_count(tmp_path):
    path = write(tmp_path, 1)
    path.with_suffix(".json").unlink()

    assert snapshot_files.steps_in(tmp_path) == []
    with pytest.raises(SnapshotError, match="is not complete"):
        snapshot_files.check(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1', '"step"'])
def test_a_label_that_is_none_is_recognised(tmp_path, content):
    path = write(tmp_path, 1)
    path.with_suffix(".json").write_text(content)
    with pytest.raises(SnapshotError, match=r"is damaged: its \.json cannot be read"):
        snapshot_files.check(path)


def test_a_write_that_fails_leaves_those_before_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = sorted((tmp_path / "snapshots").iterdir())

    def full(contents, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)

    assert sorted((tmp_path / "snapshots").iterdir()) == before
    snapshot_files.check(snapshot_files.path_of(tmp_path, 1))


def test_what_a_killed_writer_has_left_goes_with_the_next_snapshot(tmp_path):
    path = write(tmp_path, 1)
    path.with_name(".step-00000002.pt.abcd1234").write_bytes(b"half of it")

    write(tmp_path, 2)

    assert all(name.name.startswith("step-") for name in path.parent.iterdir())


def test_code_in_a_snapshot_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    path = write(tmp_path, 1)
    torch.save({"version": 1, "position": Attack()}, path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        snapshot_files.load(path)
    assert not (tmp_path / "harm").exists()


def test_a_snapshot_of_another_version_is_refused(tmp_path):
    path = write(tmp_path, 1)
    torch.save({"version": 0}, path)
    with pytest.raises(ConfigurationError, match="written by another version"):
        snapshot_files.load(path)


def test_a_label_is_readable_without_torch(tmp_path):
    label = json.loads(write(tmp_path, 3).with_suffix(".json").read_text())

    assert label["step"] == 3


def test_a_job_in_the_background_does_not_hold_up_and_its_error_is_raised_later():
    background, go_on = Background(), threading.Event()

    def job() -> None:
        go_on.wait(PATIENCE)
        raise OSError(28, "No space left on device")

    background.start(job)
    assert not background.idle
    background.check()
    go_on.set()
    with pytest.raises(OSError, match="No space left"):
        background.wait()
    assert background.idle
    background.check()
    background.close()
