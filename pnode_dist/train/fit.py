"""Training and evaluation from Python, equivalent to `pnode-dist train` and `pnode-dist evaluate`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pnode_dist.config.registry import Registered, definition_of, resolve
from pnode_dist.config.tables import Config
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import directory as run_directory
from pnode_dist.train.callbacks import Callback
from pnode_dist.train.configured import configured
from pnode_dist.train.outcome import Outcome
from pnode_dist.train.run import RunRequest, build_problem, mesh_of, run


@dataclass(frozen=True)
class Fitted:
    """A finished run: its directory, which holds the parameters in `model.pt`, and its outcome."""

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
    """Train a problem with the snapshots, metrics, preemption and status of `pnode-dist train`.

    `problem` is a class, such as a subclass of `ForecastProblem`, or a name accepted by `[problem] type`; None takes
    the problem of the configuration. `config` is the path of a TOML file, or its tables as a mapping. `overrides` are
    strings such as `"training.epochs=10"`. `resume` is `"auto"`, the path of a snapshot, or `"no"`.
    Raises `ConfigurationError` for an invalid configuration, and the errors of `pnode_dist.train.loop.train`.
    Collective on the world.
    """
    settings, found = _configured(problem, config, overrides)
    request = RunRequest(resume, overwrite, accept_changed_problem, tuple(callbacks))
    outcome, _ = run(settings, found, request)
    return Fitted(settings.run.path, outcome)


def evaluate(run_dir: str | Path, problem: Any = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate the model of a run and return its figures. Collective on the world.

    The figures are also written to `evaluation.json`. `problem` is needed only for a class that cannot be imported
    from its file, such as one defined in a notebook.
    Raises `ConfigurationError` if `run_dir` is not the directory of a trained run.
    """
    directory = Path(run_dir)
    config, found = _configured(problem, directory / run_directory.CONFIG, overrides)
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
) -> tuple[Config, Registered]:
    """Return the configuration and the problem, the same on every rank. Collective on the world."""
    if problem is None:
        return configured(config, overrides)
    if isinstance(problem, str):
        return configured(config, overrides, lambda: resolve(problem, Path()), problem.rpartition(":")[2])
    return configured(config, overrides, lambda: _of_class(problem), getattr(problem, "__name__", "run"))


def _of_class(problem: Any) -> Registered:
    """Return the definition of a problem class, located by its file or, failing that, by its module."""
    name = getattr(problem, "__qualname__", None)
    if name is None:
        raise ConfigurationError(f"problem = {problem!r}: must be a class, a name, or None")
    try:
        file: Path | None = Path(inspect.getfile(problem)).resolve()
    except (TypeError, OSError):
        file = None
    kind = f"{file}:{name}" if file is not None and file.is_file() else f"{problem.__module__}:{name}"
    return Registered(kind, definition_of(problem, kind), file if file is not None and file.is_file() else None)
