"""A complete training run, from its configuration to its last file."""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from mpi4py import MPI

from pnode_dist.config.registry import Registered, resolve
from pnode_dist.config.tables import Config
from pnode_dist.config.user_code import user_code
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import safe_points
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import heartbeat, resume
from pnode_dist.system import slurm
from pnode_dist.system.compatibility import difference, facts_here
from pnode_dist.train import loop
from pnode_dist.train.callbacks import Callback, RunStart, of_rank
from pnode_dist.train.device import device_of, place
from pnode_dist.train.loggers import TensorBoardLogger
from pnode_dist.train.outcome import Outcome
from pnode_dist.train.preemption import Preemption
from pnode_dist.train.problem import Problem
from pnode_dist.train.watchdog import Watchdog

PROGRAM = "pnode-dist"


@dataclass(frozen=True)
class RunRequest:
    """Options for starting a run, and its callbacks.

    `resume` is `"auto"`, the path of a snapshot, or `"no"`. `overwrite` replaces the files of an earlier run.
    `accept_changed_problem` allows resuming after a change of the problem's source since the snapshot.
    """

    resume: str = "no"
    overwrite: bool = False
    accept_changed_problem: bool = False
    callbacks: tuple[Callback, ...] = ()


def run(config: Config, found: Registered, request: RunRequest) -> tuple[Outcome, str]:
    """Train the configured problem and write all files of the run to its directory. Collective on the world.

    Returns the outcome and the units of its figures. No file is written until the problem is built and one loss is
    computed. Raises `ConfigurationError` on all ranks, and the errors of `pnode_dist.train.loop.train`.
    """
    directory = config.run.path
    loggers = (TensorBoardLogger(),) if config.run.tensorboard else ()
    with ExitStack() as stack:
        mesh = stack.enter_context(mesh_of(config))
        preemption = stack.enter_context(Preemption(mesh, stop_time(config)))
        callbacks = of_rank((*loggers, *request.callbacks), mesh.is_root)
        choose = functools.partial(
            resume.choose_start, request.resume, config, request.overwrite, found.sha256, request.accept_changed_problem
        )
        # Reject an invalid start before reading the data.
        is_new = run_directory.on_root(mesh, choose).snapshot is None
        device = device_of(config.training.device, mesh)
        problem = build_problem(config, mesh, found=found)
        if is_new:
            run_directory.take_trained("[training] start_from", config.training.start_from, problem.model, mesh)
        place(problem.model, device)
        with user_code("in the loss of the first batch", found.file, _fallback(found)):
            loop.check_first_batch(problem, config.training)
        lock = stack.enter_context(run_directory.held(directory, mesh))
        # The lock now excludes other runs, so this choice is final.
        start = run_directory.on_root(mesh, choose)
        snapshot = resume.open_run(start, config, mesh, request.overwrite)
        if mesh.is_root:
            _print_notes(resume.described(start, snapshot, config.training.epochs))
        beating = stack.enter_context(heartbeat.of_run(directory, lock, mesh, config.training.epochs))
        watchdog = stack.enter_context(Watchdog(mesh, config.run.hang_limit))
        stack.enter_context(safe_points.watched(watchdog))
        outcome: Outcome | None = None
        done = 0 if snapshot is None else snapshot.position.step
        callbacks.start(RunStart(directory, config.model_dump(mode="json", exclude_none=True), done))
        try:
            outcome = loop.train(
                problem,
                config.training,
                mesh,
                directory,
                config.snapshot,
                snapshot,
                config.to_toml(),
                preemption,
                beating,
                callbacks,
                found.sha256,
            )
        finally:
            callbacks.end(outcome)
    return outcome, problem.units


def build_problem(
    config: Config,
    mesh: Mesh,
    dtype: torch.dtype | None = None,
    found: Registered | None = None,
    planned: bool = False,
) -> Problem:
    """Build the configured problem with a model in `dtype`, by default `[training] dtype`. Collective on the world.

    `found` is the problem named by the configuration, if already resolved. With `planned` the sizes of its data are
    enough: a problem whose data take long to compute has a method `planned` that builds it with others. Raises
    `ConfigurationError` on all ranks if the data or the number of ranks do not fit the configuration, or for an error
    in a user-defined problem.
    """
    dtype = dtype or getattr(torch, config.training.dtype)
    found = found or resolve(config.kind, Path())
    with user_code(f"while {found.name} is built", found.file, _fallback(found)):
        build = found.definition.builder()
        problem: Problem = (getattr(build, "planned", build) if planned else build)(config, mesh, dtype)
    return problem


def mesh_of(config: Config) -> Mesh:
    """Check that all ranks agree, seed torch, and build the configured mesh. Collective on the world."""
    check_alike()
    torch.manual_seed(config.run.seed)
    return Mesh(config.mesh.state, config.mesh.data, backend=config.mesh.backend)


def check_alike() -> None:
    """Raise `ConfigurationError` unless all ranks run the same versions and command. Collective on the world."""
    facts, hosts = MPI.COMM_WORLD.gather(facts_here()), MPI.COMM_WORLD.gather(socket.gethostname())
    different = MPI.COMM_WORLD.bcast(difference(facts, hosts) if facts and hosts else None)
    if different is not None:
        raise ConfigurationError(different)


def _print_notes(notes: Iterable[str]) -> None:
    """Print notes on the start of a run to standard error."""
    for note in notes:
        print(f"{PROGRAM}: {note}", file=sys.stderr, flush=True)


def stop_time(config: Config) -> float | None:
    """Return the time at which the run stops, before the end of its Slurm job; None without a limit."""
    end = slurm.job_end() if config.run.stop_before_end else None
    return end and end - config.run.stop_before_end


def _fallback(found: Registered) -> str:
    """Return the prefix of errors in a user-defined problem; errors in this package keep their tracebacks."""
    return "" if found.file is None else found.name
