"""A complete inversion, from its configuration to its last file."""

from __future__ import annotations

import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from pnode_dist.config.registry import Registered
from pnode_dist.config.tables import Config, InverseConfig
from pnode_dist.config.user_code import user_code
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import Inverse, Minimum, Progress, laplace, minimise
from pnode_dist.ode import safe_points
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import heartbeat
from pnode_dist.runs.endings import Preempted
from pnode_dist.runs.metrics import peak_memory
from pnode_dist.runs.resume import MAY_CHANGE, changed_key
from pnode_dist.train.iterations import Iterations
from pnode_dist.train.preemption import Preemption, SolveAbandoned
from pnode_dist.train.problem import Inversion, Problem
from pnode_dist.train.run import PROGRAM, build_problem, mesh_of, stop_time
from pnode_dist.train.watchdog import Watchdog

_MAY_CHANGE = {**MAY_CHANGE, "mesh": set[str](), "inverse": {"iterations", "eigenvalues", "members"}}


@dataclass(frozen=True)
class InversionOutcome:
    """The end of an inversion: the figures of its problem, its minimum, and the seconds that this process took."""

    figures: dict[str, Any]
    minimum: Minimum
    seconds: float

    @property
    def reached_the_limit(self) -> bool:
        """True if the configured number of iterations ended the minimisation."""
        return self.minimum.reason.endswith("number of iterations is reached")


def invert(config: Config, found: Registered, resume: bool = False, overwrite: bool = False) -> InversionOutcome:
    """Minimise the inverse problem of the configured problem, and write all files of the run. Collective on the world.

    No file is written until the problem is built. The result of every evaluation is written, and with `resume` those in
    the run directory are read in place of their evaluations. Raises, on all ranks, `ConfigurationError`, the errors of
    a solve at the first guess, and `Preempted` if the inversion was stopped.
    """
    began, directory, settings = time.perf_counter(), config.run.path, _settings(config, found)
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(config))
        if mesh.data_replicas > 1:
            raise ConfigurationError(f"[mesh] data = {mesh.data_replicas}: must be 1 for invert, which has no batches")
        preemption = stack.enter_context(Preemption(mesh, stop_time(config)))
        # Reject an invalid start before the problem is built.
        run_directory.on_root(mesh, lambda: _goes_on(config, resume, overwrite))
        problem = build_problem(config, mesh, torch.float64, found)
        with user_code("in inverse", found.file, "" if found.file is None else found.name):
            inverse = problem.inverse()
        lock = stack.enter_context(run_directory.held(directory, mesh))
        # The lock now excludes other runs, so this choice is final.
        goes_on = run_directory.on_root(mesh, lambda: _goes_on(config, resume, overwrite))
        if goes_on:
            run_directory.go_on(directory, config, mesh, step=0, metrics=0)
            if mesh.is_root:
                where = directory / run_directory.RECORD
                print(f"{PROGRAM}: going on from the evaluations in {where}", file=sys.stderr, flush=True)
        else:
            run_directory.create(directory, config, mesh, overwrite or resume)
        beating = stack.enter_context(heartbeat.of_run(directory, lock, mesh, settings.iterations))
        watchdog = stack.enter_context(Watchdog(mesh, config.run.hang_limit))
        stack.enter_context(safe_points.watched(watchdog))
        stack.enter_context(safe_points.watched(preemption))
        shown = stack.enter_context(Iterations(directory if mesh.is_root else None, settings.iterations, beating))
        try:
            result = _minimised(inverse, settings, directory, goes_on, shown, preemption)
            approximation = None
            if settings.eigenvalues:
                approximation = laplace(inverse, result.m, settings.eigenvalues, seed=config.run.seed)
            inversion = Inversion(inverse, inverse.space.guess(), result, approximation)
            figures = _evaluated(problem, inversion, directory, mesh)
        except SolveAbandoned:
            raise Preempted(
                f"stopped by {preemption.reason()}: all evaluations are in {directory / run_directory.RECORD}; "
                "--resume auto goes on"
            ) from None
        shown.finish()
    return InversionOutcome(figures, result, time.perf_counter() - began)


def _settings(config: Config, found: Registered) -> InverseConfig:
    settings = getattr(config, "inverse", None)
    if not isinstance(settings, InverseConfig):
        raise ConfigurationError(
            f"{found.name}: invert needs a problem that defines inverse and InverseConfig, a class derived from "
            "pnode_dist.config.tables.InverseConfig"
        )
    return settings


def _minimised(
    inverse: Inverse, settings: InverseConfig, directory: Path, resume: bool, shown: Iterations, preemption: Preemption
) -> Minimum:
    def after_iteration(progress: Progress) -> bool:
        shown.show(progress, inverse.comm.allreduce(peak_memory(), MPI.MAX))
        return preemption.wanted

    result = minimise(
        inverse,
        method=settings.method,
        options=settings.options,
        hessian=settings.hessian or "exact",
        callback=after_iteration,
        record=directory / run_directory.RECORD,
        resume=resume,
    )
    if result.reason.startswith("stopped"):
        raise SolveAbandoned
    return result


def _evaluated(problem: Problem, inversion: Inversion, directory: Path, mesh: Mesh) -> dict[str, Any]:
    minimum = inversion.minimum
    figures = {
        **problem.evaluate_inverse(inversion, directory),
        "value": minimum.value,
        "iterations": minimum.iterations,
        "evaluations": minimum.evaluations,
        "products": minimum.products,
        "ending": minimum.reason,
    }
    if inversion.approximation is not None:
        figures["eigenvalues"] = list(inversion.approximation.eigenvalues)
    run_directory.save_evaluation(directory, figures, mesh)
    return figures


def _goes_on(config: Config, resume: bool, overwrite: bool) -> bool:
    """Return True if evaluations in the run directory are read. Raises `ConfigurationError` if it cannot be used."""
    directory = config.run.path
    if resume and overwrite:
        raise ConfigurationError("--overwrite replaces what --resume auto goes on from: must be one of them")
    recorded = (directory / run_directory.RECORD / "evaluation-000000.pt").exists()
    if not resume or not recorded:
        # A run that ended before its first evaluation begins anew.
        run_directory.check_free(directory, overwrite or (resume and (directory / run_directory.CONFIG).is_file()))
        return False
    try:
        tables = tomllib.loads((directory / run_directory.CONFIG).read_text())
    except (OSError, ValueError):
        raise ConfigurationError(f"run directory {directory}: its {run_directory.CONFIG} cannot be read") from None
    before, now = type(config).model_validate(tables).model_dump(mode="json"), config.model_dump(mode="json")
    changed = changed_key(before, now, _MAY_CHANGE)
    if changed is not None:
        table, name = changed
        raise ConfigurationError(
            f"[{table}] {name} = {now[table].get(name)!r}: must stay {before[table].get(name)!r} to go on in "
            f"{directory}; --overwrite begins a new run"
        )
    return True
