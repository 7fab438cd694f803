"""Event files for TensorBoard, read back record by record."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pnode_dist import ConfigurationError
from pnode_dist.runs import tensorboard
from pnode_dist.runs.metrics import Record, StepRecord, ValidationRecord
from pnode_dist.runs.tensorboard import EventFile

_LENGTH, _CHECKSUM = 8, 4


def events(path: Path) -> Iterator[Any]:
    """The events of a TFRecord file."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        at += _LENGTH + _CHECKSUM
        yield Event.FromString(content[at : at + length])
        at += length + _CHECKSUM


def curves(directory: Path) -> dict[tuple[str, int], float]:
    """The values by name and step, as TensorBoard shows them: a new start puts away what an earlier file has after."""
    found: dict[tuple[str, int], float] = {}
    for path in sorted((directory / "tensorboard").iterdir()):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


@contextmanager
def writing(directory: Path, step: int) -> Iterator[EventFile]:
    with tensorboard.of_run(directory, True, step) as file:
        assert file is not None
        yield file


def record(step: int, loss: float) -> Record:
    return StepRecord(step, 1, loss, 0.5, 1.0, 2.0, 3, 4, 5, 6, 7, 8, 9, 10)


def test_every_figure_of_a_step_and_of_a_validation_is_a_curve(tmp_path: Path) -> None:
    with writing(tmp_path, 0) as file:
        file.write(record(1, 0.25))
        file.write(ValidationRecord(1, 1, 2.0, "K", {"rmse": 0.75}))
    found = curves(tmp_path)
    assert found["step/loss", 1] == 0.25
    assert found["step/adjoint_steps", 1] == 5
    assert found["validation/rmse", 1] == 0.75
    assert {name for name, _ in found}.isdisjoint({"step/step", "step/epoch", "step/wall_time"})


def test_a_run_that_is_resumed_replaces_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    with writing(tmp_path, 0) as file:
        for step in (1, 2, 3):
            file.write(record(step, 1.0))
    with writing(tmp_path, 2) as file:
        file.write(record(3, 0.5))
    losses = {step: value for (name, step), value in curves(tmp_path).items() if name == "step/loss"}
    assert losses == {1: 1.0, 2: 1.0, 3: 0.5}


def test_nothing_is_written_unless_it_is_wanted(tmp_path: Path) -> None:
    with tensorboard.of_run(tmp_path, False, 0) as file:
        assert file is None
    assert list(tmp_path.iterdir()) == []


def test_removing_a_run_s_event_files_leaves_what_others_put_there(tmp_path: Path) -> None:
    with writing(tmp_path, 0):
        pass
    (tmp_path / "tensorboard" / "notes").touch()
    tensorboard.remove(tmp_path)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["notes"]


def test_without_tensorboardx_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"tensorboard = true: needs tensorboardX: pip install"):
        tensorboard.check_available()
