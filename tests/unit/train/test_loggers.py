"""Loggers of metrics: what TensorBoard, mlflow and objects like a wandb run are given."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pnode_dist import ConfigurationError
from pnode_dist.runs import tensorboard
from pnode_dist.runs.metrics import StepRecord, ValidationRecord
from pnode_dist.train.callbacks import RunStart
from pnode_dist.train.loggers import MlflowLogger, TensorBoardLogger, WandbLogger
from pnode_dist.train.outcome import Outcome

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
def writing(directory: Path, step: int) -> Iterator[TensorBoardLogger]:
    logger = TensorBoardLogger()
    logger.on_start(RunStart(directory, {}, step))
    yield logger
    logger.on_end(None)


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step, 1, loss, 0.5, 1.0, 2.0, 3, 4, 5, 6, 7, 8, 9, 10)


def test_every_figure_of_a_step_and_of_a_validation_is_a_curve(tmp_path: Path) -> None:
    with writing(tmp_path, 0) as logger:
        logger.on_step(record(1, 0.25))
        logger.on_validation(ValidationRecord(1, 1, 2.0, "K", {"rmse": 0.75}))
    found = curves(tmp_path)
    assert found["step/loss", 1] == 0.25
    assert found["step/adjoint_steps", 1] == 5
    assert found["validation/rmse", 1] == 0.75
    assert {name for name, _ in found}.isdisjoint({"step/step", "step/epoch", "step/wall_time"})


def test_a_run_that_is_resumed_replaces_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    with writing(tmp_path, 0) as logger:
        for step in (1, 2, 3):
            logger.on_step(record(step, 1.0))
    with writing(tmp_path, 2) as logger:
        logger.on_step(record(3, 0.5))
    losses = {step: value for (name, step), value in curves(tmp_path).items() if name == "step/loss"}
    assert losses == {1: 1.0, 2: 1.0, 3: 0.5}


def test_removing_a_run_s_event_files_leaves_what_others_put_there(tmp_path: Path) -> None:
    with writing(tmp_path, 0):
        pass
    (tmp_path / "tensorboard" / "notes").touch()
    tensorboard.remove(tmp_path)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["notes"]


def test_without_tensorboardx_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigurationError, match=r"tensorboard = true: needs tensorboardX \(.*\): pip install"):
        tensorboard.check_available()


def test_an_object_with_a_log_method_is_given_every_figure() -> None:
    logged: list[tuple[int, dict[str, Any]]] = []

    class Run:
        def log(self, data: dict[str, Any], step: int) -> None:
            logged.append((step, data))

    logger = WandbLogger(Run())
    logger.on_step(record(1, 0.25))
    logger.on_validation(ValidationRecord(1, 1, 2.0, "K", {"rmse": 0.75}))
    assert [step for step, _ in logged] == [1, 1]
    assert logged[0][1]["step/loss"] == 0.25
    assert logged[1][1] == {"validation/rmse": 0.75}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file store of mlflow."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path}/mlruns"


def test_mlflow_has_the_parameters_the_metrics_and_the_end_of_a_run(tmp_path: Path, store: str) -> None:
    from mlflow.tracking import MlflowClient

    logger = MlflowLogger(store, "experiment")
    logger.on_start(RunStart(tmp_path / "run", {"training": {"epochs": 2}}))
    for step in (1, 2):
        logger.on_step(record(step, 1.0 / step))
    logger.on_validation(ValidationRecord(2, 1, 2.0, "K", {"rmse": 0.75}))
    logger.on_end(Outcome(2, 1.0, 0.5, 1, {}))

    run = MlflowClient(store).get_run(logger.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"training.epochs": "2"}
    assert run.data.metrics["step/loss"] == 0.5
    assert run.data.metrics["validation/rmse"] == 0.75
    history = MlflowClient(store).get_metric_history(logger.run_id, "step/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_a_resumed_run_goes_on_in_its_run_of_mlflow(tmp_path: Path, store: str) -> None:
    first, second = MlflowLogger(store), MlflowLogger(store)
    first.on_start(RunStart(tmp_path / "run", {}))
    first.on_end(None)
    second.on_start(RunStart(tmp_path / "run", {}, step=5))
    assert second.run_id == first.run_id
    other = MlflowLogger(store)
    other.on_start(RunStart(tmp_path / "other", {}, step=5))
    assert other.run_id != first.run_id
