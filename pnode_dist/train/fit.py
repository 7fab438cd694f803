"""Training and evaluating from Python: the entrance to the machinery behind `pnode-dist train` and `evaluate`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pnode_dist.config import load as configuration
from pnode_dist.config.registry import Registered, definition_of, resolve
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import directory as run_directory
from pnode_dist.train.callbacks import Callback
from pnode_dist.train.outcome import Outcome
from pnode_dist.train.run import RunRequest, build_problem, mesh_of, run


@dataclass(frozen=True)
class Fitted:
    """A run that has ended: its directory, with the parameters in `model.pt`, and how it ended."""

    directory: Path
    outcome: Outcome


def fit(
    problem: Any,
    config: str | Path | Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    *,
    overrides: Sequence[str] = (),
    resume: str = "no",
    overwrite: bool = False,
    accept_changed_problem: bool = False,
) -> Fitted:
    """Train a problem, with snapshots, metrics, preemption and status as `pnode-dist train` has them.

    `problem` is a class such as a `ForecastProblem`, or a name as `[problem] type` has it; None takes that of the
    configuration. `config` is the path of a TOML file, or its tables as a mapping. `overrides` are such as
    `"training.epochs=10"`. `resume`: `"auto"`, the path of a snapshot, or `"no"`.
    Raises `ConfigurationError` for a wrong configuration, and what else ends a run, see `pnode_dist.train.loop.train`.
    Collective on the world.
    """
    found, settings = _configured(problem, config, overrides)
    request = RunRequest(resume, overwrite, accept_changed_problem, tuple(callbacks))
    outcome, _ = run(settings, found, request)
    return Fitted(settings.run.path, outcome)


def evaluate(run_dir: str | Path, problem: Any = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate the model of a run: the figures, which are also written to `evaluation.json`. Collective on the world.

    `problem` is needed only for a class that cannot be imported from its file, as in a notebook.
    Raises `ConfigurationError` for what is not the directory of a trained run.
    """
    directory = Path(run_dir)
    found, config = _configured(problem, directory / run_directory.CONFIG, overrides)
    with mesh_of(config) as mesh:
        built = build_problem(config, mesh, found=found)
        run_directory.load_parameters(built.model, directory / run_directory.MODEL)
        built.model.eval()
        with torch.no_grad():
            result = built.evaluate(built.model, directory)
        run_directory.save_evaluation(directory, result, mesh)
    return result


def _configured(
    problem: Any, config: str | Path | Mapping[str, Any], overrides: Sequence[str]
) -> tuple[Registered, Any]:
    if isinstance(config, Mapping):
        name = problem if isinstance(problem, str) else getattr(problem, "__name__", "run")
        raw = configuration.from_tables(config, name.rpartition(":")[2], overrides)
    else:
        raw = configuration.read(config, overrides)
    if problem is None:
        settings = configuration.validated(raw)
        return resolve(settings.kind, Path()), settings
    found = resolve(problem, Path()) if isinstance(problem, str) else _of_class(problem)
    return found, configuration.validated(raw, found)


def _of_class(problem: Any) -> Registered:
    """The class as if a configuration had named it: by its file, or else by its module."""
    name = getattr(problem, "__qualname__", None)
    if name is None:
        raise ConfigurationError(f"problem = {problem!r}: must be a class, a name, or None")
    try:
        file: Path | None = Path(inspect.getfile(problem)).resolve()
    except (TypeError, OSError):
        file = None
    kind = f"{file}:{name}" if file is not None and file.is_file() else f"{problem.__module__}:{name}"
    return Registered(kind, definition_of(problem, kind), file if file is not None and file.is_file() else None)
