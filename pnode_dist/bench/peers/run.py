"""The comparison: every case by every solver that can compute it, in turn on one core.

Times are processor seconds. Ratios are of medians within one run. The solvers of a case take turns, so a slow period
of the machine affects all of them alike.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpi4py import MPI

from pnode_dist.bench.peers.cases import CASES, COMPILED, DIFFRAX, OURS, PLAIN, Arrays, PeerCase, solvers_of
from pnode_dist.bench.peers.environment import python_with_diffrax
from pnode_dist.bench.peers.worker import Worker, WorkerError, is_of_jax
from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.errors import ConfigurationError

LARGEST_ERROR = 1e-12
_NAN = float("nan")
_CONTINUOUS = ("adjoint", "backsolve")


@dataclass(frozen=True)
class Measured:
    """Results of a solver on a case. Seconds are those of the rounds; `first` those of the first call of each kind."""

    forward: Sequence[float]
    gradient: Sequence[float]
    first: tuple[float, float]
    peak_bytes: int
    arrays: Arrays


def measure(case: PeerCase, solvers: Mapping[str, Path], core: int) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measure the case with each solver, given their interpreters. Also returns the reasons of those that failed."""
    found: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        workers: dict[str, Worker] = {}
        first: dict[str, tuple[float, float]] = {}
        for solver, python in solvers.items():
            try:
                worker = stack.enter_context(Worker(case.name, solver, python, core))
                first[solver] = (worker.ask("forward")["seconds"], worker.ask("gradient")["seconds"])
                # What compilation takes is not the memory of a gradient.
                worker.ask("reset")
                workers[solver] = worker
            except WorkerError as error:
                failed[solver] = str(error)
        seconds: dict[str, dict[str, list[float]]] = {solver: {"forward": [], "gradient": []} for solver in workers}
        for _ in range(case.rounds):
            for solver, worker in workers.items():
                for request, taken in seconds[solver].items():
                    taken.append(worker.ask(request)["seconds"])
        for number, (solver, worker) in enumerate(workers.items()):
            file = Path(folder, f"{number}.npz")
            worker.ask(f"save {file}")
            with np.load(file) as arrays:
                found[solver] = Measured(
                    seconds[solver]["forward"],
                    seconds[solver]["gradient"],
                    first[solver],
                    worker.ask("memory")["bytes"],
                    dict(arrays),
                )
    return found, failed


def difference(arrays: Arrays, reference: Arrays, names: Sequence[str]) -> float:
    """Return the largest difference of those arrays relative to the largest entry of the reference's."""
    return max(
        float(np.abs(arrays[name].astype(float) - reference[name]).max() / np.abs(reference[name]).max())
        for name in names
    )


def rows_of(case: PeerCase, found: Mapping[str, Measured]) -> Iterator[Row]:
    """Return a row for each solver. Ratios are this project's eager median over the solver's.

    Differences are to plain torch where it computes the case, else to diffrax.
    """
    reference = found.get(PLAIN) or found.get(DIFFRAX)
    for solver, measured in found.items():
        names = sorted(measured.arrays.keys() - {"end"})
        row: Row = {
            "case": case.name,
            "solver": solver,
            "forward": 1e3 * statistics.median(measured.forward),
            "x": ratio(found, OURS, solver, "forward"),
            "gradient": 1e3 * statistics.median(measured.gradient),
            "x ": ratio(found, OURS, solver, "gradient"),
            "first": sum(measured.first),
            "MiB": measured.peak_bytes / 2**20,
            "state": _NAN if reference is None else difference(measured.arrays, reference.arrays, ["end"]),
            "grad": _NAN if reference is None else difference(measured.arrays, reference.arrays, names),
        }
        yield row


def least_of(case: PeerCase, found: Mapping[str, Measured]) -> Iterator[Row]:
    """Return the least milliseconds of each solver."""
    for solver, measured in found.items():
        least = {kind: 1e3 * min(getattr(measured, kind)) for kind in ("forward", "gradient")}
        yield {"case": case.name, "solver": solver, **least}


def ratio(found: Mapping[str, Measured], solver: str, peer: str, kind: str) -> float:
    """Return the ratio of medians, NaN if one of the two was not measured."""
    if solver not in found or peer not in found:
        return _NAN
    return float(statistics.median(getattr(found[solver], kind)) / statistics.median(getattr(found[peer], kind)))


def checks_of(case: PeerCase, found: Mapping[str, Measured]) -> list[Check]:
    """Compare with the targets: eager with plain torch, compiled with the fastest peer, and gradients."""
    checks = []

    def check(what: str, value: float, target: float) -> None:
        if value == value:
            checks.append(Check(f"{case.name}: {what}", value, target))

    # The gradients of continuous adjoints are not those of the steps.
    exact = [solver for solver in found if solver not in (OURS, COMPILED) and not solver.endswith(_CONTINUOUS)]
    if PLAIN in found and not case.checkpoints:
        check("gradient, eager over plain torch", ratio(found, OURS, PLAIN, "gradient"), 1.05)
    fastest = COMPILED if COMPILED in found else OURS
    for kind in ("forward", "gradient"):
        rivals = [DIFFRAX] if case.is_implicit or case.checkpoints or case.name.startswith("tiny") else exact
        rivals = [rival for rival in rivals if rival in found]
        if fastest in found and rivals:
            best = min(rivals, key=lambda rival: statistics.median(getattr(found[rival], kind)))
            check(f"{kind}, {fastest} over {best}", ratio(found, fastest, best, kind), 1.0)
    if case.name == "tiny" and {COMPILED, DIFFRAX} <= found.keys():
        check("first call over diffrax's", sum(found[COMPILED].first) / sum(found[DIFFRAX].first), 1.5)
    if case.checkpoints and {OURS, DIFFRAX} <= found.keys():
        check("memory over diffrax's", found[OURS].peak_bytes / found[DIFFRAX].peak_bytes, 1.0)
    if case.dtype == "float64" and case.steps and not case.is_implicit and {OURS, PLAIN} <= found.keys():
        names = sorted(found[OURS].arrays)
        check("error of values and gradient", difference(found[OURS].arrays, found[PLAIN].arrays, names), LARGEST_ERROR)
    return checks


def chosen(names: Sequence[str] | None) -> list[PeerCase]:
    """Return the cases of these names, all by default. Raises `ConfigurationError` for an unknown name."""
    known = {case.name: case for case in CASES}
    for name in names or ():
        if name not in known:
            raise ConfigurationError(f"--cases {name}: must be some of {', '.join(known)}")
    return [known[name] for name in names] if names else list(CASES)


def run(cases: Sequence[str] | None = None) -> Report:
    """Measure on one core.

    Raises `ConfigurationError` on several ranks, and for an unknown name in `cases`.
    """
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench peers runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    wanted = chosen(cases)
    notes = [
        "forward, gradient: milliseconds of processor time on one core, medians of interleaved rounds; x: pnode_dist "
        "(eager) over the solver; first: seconds of the first forward and the first gradient, compilation included; "
        "MiB: peak of the rounds above the memory before the first solve, compiled code included; state, grad: largest "
        "relative difference to plain torch, or to diffrax where plain torch is not measured.",
        "torchdiffeq's rk4 is Kutta's 3/8 rule. Continuous adjoints (adjoint, backsolve) are not exact.",
    ]
    own = Path(sys.executable)
    try:
        with_diffrax: Path | None = python_with_diffrax()
    except ConfigurationError as error:
        with_diffrax = None
        notes.append(f"diffrax is not measured: {error}")
    core = max(os.sched_getaffinity(0))
    rows: list[Row] = []
    least: list[Row] = []
    checks: list[Check] = []
    for case in wanted:
        pythons = {solver: with_diffrax if is_of_jax(solver) else own for solver in solvers_of(case)}
        found, failed = measure(case, {solver: python for solver, python in pythons.items() if python}, core)
        rows += rows_of(case, found)
        least += least_of(case, found)
        checks += checks_of(case, found)
        notes.append(f"{case.name}: {case.title}")
        notes += [f"{case.name}: {solver} is not measured: {reason}" for solver, reason in failed.items()]
    return Report("peers", rows, checks, notes, further={"least milliseconds": least})
