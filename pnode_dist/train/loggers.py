"""Callbacks that log the metrics of a run to TensorBoard, mlflow, or an object with the interface of a wandb run."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import tensorboard
from pnode_dist.runs.metrics import Record, StepRecord, ValidationRecord
from pnode_dist.train.callbacks import Callback, RunStart
from pnode_dist.train.outcome import Outcome

_NOT_METRICS = {"step", "epoch", "wall_time"}
_LONGEST_PARAMETER = 500
_DIRECTORY_TAG = "pnode_dist.run_directory"


def figures_of(record: Record) -> dict[str, float]:
    """Return the figures of a record by name, such as `step/loss` or `validation/lead_1`."""
    if isinstance(record, StepRecord):
        return {f"step/{name}": value for name, value in asdict(record).items() if name not in _NOT_METRICS}
    return {f"validation/{name}": value for name, value in record.figures.items()}


def parameters_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the configuration as flat names, such as `training.epochs`, and values."""
    return {f"{table}.{key}": str(value) for table, keys in config.items() for key, value in keys.items()}


class TensorBoardLogger(Callback):
    """Write event files for TensorBoard, by default into `tensorboard` in the run directory.

    For a resumed run, TensorBoard ignores points in earlier files that lie after the resumed step. Requires the extra
    `tensorboard`. Raises `ConfigurationError` if tensorboardX is not installed.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        tensorboard.check_available()
        self._directory = None if directory is None else Path(directory)
        self._file: tensorboard.EventFile | None = None

    def on_start(self, start: RunStart) -> None:
        """Open the event file."""
        self._file = tensorboard.EventFile(self._directory or start.directory / tensorboard.DIRECTORY, start.step)

    def on_step(self, record: StepRecord) -> None:
        """Add a point to each step curve."""
        self._write(record)

    def on_validation(self, record: ValidationRecord) -> None:
        """Add a point to each validation curve."""
        self._write(record)

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(figures_of(record), record.step)

    def on_end(self, outcome: Outcome | None) -> None:
        """Flush the added points and close the file."""
        if self._file is not None:
            self._file.close()


class MlflowLogger(Callback):
    """Log parameters, metrics and the state of a run to mlflow. Requires the extra `mlflow`.

    `tracking_uri` is a server or a `file:` store; the default is that of mlflow. `experiment` is created if it does
    not exist. A resumed run continues the mlflow run of its directory. Raises `ConfigurationError` if mlflow is not
    installed.
    """

    def __init__(
        self, tracking_uri: str | None = None, experiment: str = "pnode-dist", run_name: str | None = None
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigurationError("MlflowLogger: needs mlflow: pip install 'pnode-dist[mlflow]'")
        self._tracking_uri, self._experiment, self._run_name = tracking_uri, experiment, run_name
        self._client: Any = None
        self.run_id = ""

    def on_start(self, start: RunStart) -> None:
        """Start an mlflow run, or continue that of the directory."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(self._tracking_uri)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        directory = str(start.directory.resolve())
        earlier: list[Any] = []
        if start.step > 0:
            earlier = self._client.search_runs([experiment], f"tags.`{_DIRECTORY_TAG}` = '{directory}'", max_results=1)
        if earlier:
            self.run_id = earlier[0].info.run_id
            self._client.set_terminated(self.run_id, "RUNNING")
            return
        name = self._run_name or start.directory.name
        run = self._client.create_run(experiment, tags={_DIRECTORY_TAG: directory}, run_name=name)
        self.run_id = run.info.run_id
        for key, value in parameters_of(start.config).items():
            self._client.log_param(self.run_id, key, value[:_LONGEST_PARAMETER])

    def on_step(self, record: StepRecord) -> None:
        """Log the figures of a step."""
        self._log(record)

    def on_validation(self, record: ValidationRecord) -> None:
        """Log the figures of a validation."""
        self._log(record)

    def _log(self, record: Record) -> None:
        for name, value in figures_of(record).items():
            self._client.log_metric(self.run_id, name, float(value), step=record.step)

    def on_end(self, outcome: Outcome | None) -> None:
        """Mark the mlflow run as finished, or as killed if the run was stopped or has failed."""
        if self.run_id:
            self._client.set_terminated(self.run_id, "KILLED" if outcome is None else "FINISHED")


class LogsMetrics(Protocol):
    """Interface required of a logger: the `log` method of a wandb run."""

    def log(self, data: dict[str, Any], step: int) -> Any: ...


class WandbLogger(Callback):
    """Log to `run`, an object with a method `log(data, step=)`, such as a run of wandb, swanlab or trackio.

    The caller creates `run` on rank 0 and finishes it.
    """

    def __init__(self, run: LogsMetrics) -> None:
        self._run = run

    def on_step(self, record: StepRecord) -> None:
        """Log the figures of a step."""
        self._run.log(figures_of(record), step=record.step)

    def on_validation(self, record: ValidationRecord) -> None:
        """Log the figures of a validation."""
        self._run.log(figures_of(record), step=record.step)
