"""Strong and weak scaling of a training step, measured in one run and projected to more ranks by a cost model.

Runs in float32 with one thread per rank. References are one process with as many threads, with this project's solver
and with torchdiffeq's, and the limit of the machine: as many processes, each with a rank's part of the work, without
communication. Ranks that take no part in a measurement sleep during it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.bench import spectral_scaling
from pnode_dist.bench.cost_model import CostModel, Exchanges, Network, Prediction, Work
from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.bench.some_ranks import cores_of, on_first, threads
from pnode_dist.bench.training_step import STAGES, STEP_SIZE, STEPS, TrainingStep, exchanged_channels
from pnode_dist.errors import ConfigurationError

EFFICIENCY = 0.9
LARGEST_GRADIENT_DIFFERENCE = 1e-12
PREDICTION_ERROR = 0.25
POINTS = 512
SPECTRAL_POINTS = 256
ROUNDS = 3
SMALL = (8, 32, 128)
EXACT = 48
PROJECTED = (4, 16, 64, 256, 1024)
_PING_PONGS = {8: 400, 2**20: 20}


def torchdiffeq_seconds(step: TrainingStep, odeint: Callable[..., Any]) -> float:
    """Return the seconds of the same step with torchdiffeq's back-propagation, on one rank."""
    times = torch.tensor([0.0, step.steps * STEP_SIZE])
    began = time.perf_counter()
    end = odeint(step.func, step.state, times, method="rk4", options={"step_size": STEP_SIZE})[-1]
    torch.autograd.grad(end.square().sum(), list(step.func.parameters()))
    return time.perf_counter() - began


@dataclass(frozen=True)
class Task:
    """Simultaneous work of the first `ranks` ranks. `seconds` runs it and returns the seconds of a rank."""

    name: str
    ranks: int
    seconds: Callable[[], float]


def rank_counts(size: int) -> list[int]:
    """Return 1, 2, 4, ... and `size`."""
    return sorted({2**power for power in range(size.bit_length()) if 2**power <= size} | {size})


def measure(tasks: list[Task], comm: MPI.Intracomm, rounds: int) -> dict[tuple[str, int], float]:
    """Return the least seconds of each task over interleaved rounds, by name and ranks. Collective on `comm`."""
    least: dict[tuple[str, int], float] = {}
    for _ in range(rounds):
        for task in tasks:
            key = (task.name, task.ranks)
            least[key] = min(least.get(key, math.inf), on_first(comm, task.ranks, task.seconds))
    return least


@dataclass(frozen=True)
class Parts:
    """Seconds of a training step on the first `ranks` ranks: the whole, and halos and gradient sum measured alone."""

    ranks: int
    shape: tuple[int, int]
    processes: tuple[int, ...]
    seconds: float
    halo: float
    gradient_sum: float

    @property
    def work(self) -> float:
        """Seconds of the remainder: work on the rank's own block, and waiting for other ranks."""
        return self.seconds - self.halo - self.gradient_sum


def ping_pong(comm: MPI.Intracomm) -> Network:
    """Measure latency and bandwidth between the first two ranks. Collective on `comm`, of two or more ranks."""
    least = dict.fromkeys(_PING_PONGS, math.inf)

    def exchange(size: int, repeats: int) -> float:
        buffer, other = np.zeros(size, dtype=np.uint8), 1 - comm.rank
        shortest = math.inf
        for _ in range(repeats):
            began = time.perf_counter()
            if comm.rank == 0:
                comm.Send(buffer, other)
                comm.Recv(buffer, other)
            else:
                comm.Recv(buffer, other)
                comm.Send(buffer, other)
            shortest = min(shortest, (time.perf_counter() - began) / 2)
        return shortest

    for size, repeats in _PING_PONGS.items():
        least[size] = on_first(comm, 2, partial(exchange, size, repeats))
    (small, latency), (large, seconds) = least.items()
    return Network(latency, (large - small) / max(seconds - latency, 1e-12))


def squarest(ranks: int) -> tuple[int, int]:
    """Return the most nearly square process grid for a power of two."""
    power = ranks.bit_length() - 1
    return 2 ** (power - power // 2), 2 ** (power // 2)


def run() -> Report:
    """Measure on 1, 2, 4, ... and all ranks. Collective on the world."""
    comm = MPI.COMM_WORLD
    try:
        import torchdiffeq
    except ImportError:
        raise ConfigurationError("bench scaling compares with torchdiffeq, which is not installed") from None
    if POINTS % comm.size:
        raise ConfigurationError(f"bench scaling: {POINTS} rows cannot be shared evenly by {comm.size} ranks")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured(comm, torchdiffeq.odeint, POINTS)
    finally:
        torch.set_num_threads(before)


def measured(comm: MPI.Intracomm, odeint: Callable[..., Any], points: int, rounds: int = ROUNDS) -> Report:
    """Return the report for a grid of `points` x `points`. Collective on `comm`."""
    counts, cores = rank_counts(comm.size), cores_of(comm)
    node_cores = len(cores) or comm.size
    used = min(node_cores, comm.size)
    part = points // comm.size
    everything = (points, points)
    steps: dict[tuple[str, int], TrainingStep] = {}
    for ranks in counts:
        subset = comm.Split(0 if comm.rank < ranks else MPI.UNDEFINED, comm.rank)
        if subset != MPI.COMM_NULL:
            steps["strong", ranks] = TrainingStep(subset, everything)
            # On all ranks both are the same step.
            steps["weak", ranks] = (
                steps["strong", ranks] if ranks == comm.size else TrainingStep(subset, (part * ranks, points))
            )
    alone = TrainingStep(MPI.COMM_SELF, (part, points))
    small = {n: TrainingStep(MPI.COMM_SELF, (n, n)) for n in SMALL}
    tasks = [Task("strong", ranks, partial(_of, steps, ("strong", ranks), TrainingStep.seconds)) for ranks in counts]
    tasks += [Task("weak", ranks, partial(_of, steps, ("weak", ranks), TrainingStep.seconds)) for ranks in counts[:-1]]
    tasks += [Task(f"small {n}", 1, step.seconds) for n, step in small.items()]
    if comm.size > 1:
        tasks.append(Task("independent", comm.size, alone.seconds))
    whole = steps.get(("strong", 1))

    def threaded(seconds: Callable[[TrainingStep], float]) -> float:
        assert whole is not None
        with threads(used, cores):
            return seconds(whole)

    if used > 1:
        tasks.append(Task("threads", 1, lambda: threaded(TrainingStep.seconds)))
    tasks.append(Task("torchdiffeq", 1, lambda: threaded(lambda step: torchdiffeq_seconds(step, odeint))))
    seconds = measure(tasks, comm, rounds)
    seconds["weak", comm.size] = seconds["strong", comm.size]
    parts = {}
    for kind in ("strong", "weak"):
        for ranks in counts:
            key = (kind, ranks)
            halo = on_first(comm, ranks, partial(_of, steps, key, TrainingStep.halo_seconds))
            total = on_first(comm, ranks, partial(_of, steps, key, TrainingStep.sum_seconds))
            shape = everything if kind == "strong" else (part * ranks, points)
            processes = comm.bcast(steps[key].partition.processes if comm.rank == 0 else None)
            parts[key] = Parts(ranks, shape, processes, seconds[key], halo, total)
    differences = {
        ranks: on_first(comm, ranks, partial(_of, steps, ("strong", ranks), gradient_difference))
        for ranks in counts[1:]
    }
    model = None
    if comm.size > 1:
        known = {points**2: seconds["strong", 1], part * points: seconds["weak", 1]}
        known |= {n * n: seconds[f"small {n}", 1] for n in SMALL}
        shared = max(1.0, comm.size / node_cores)
        model = CostModel(
            Work(tuple(known.items())),
            Exchanges(tuple(STEPS * STAGES * 2 * [4 * channels for channels in exchanged_channels()]), 1),
            gradient_bytes=4 * len(alone.gradient),
            network=ping_pong(comm),
            contention=max(1.0, seconds["independent", comm.size] / seconds["weak", 1] / shared),
            cores=node_cores,
        )
    found = report(parts, seconds, differences, model, used, (part, points))
    network = None if model is None else model.network
    spectral = spectral_scaling.measured(comm, counts, min(SPECTRAL_POINTS, points), rounds, network, node_cores)
    return replace(
        found,
        checks=[*found.checks, *spectral.checks],
        notes=[*found.notes, *spectral.notes],
        further={"scaling, spectral": spectral.rows},
    )


def _of(
    steps: Mapping[tuple[str, int], TrainingStep], key: tuple[str, int], measure: Callable[[TrainingStep], float]
) -> float:
    """Apply `measure` to a step. Only the ranks that take part hold the step."""
    return measure(steps[key])


def gradient_difference(step: TrainingStep) -> float:
    """Return the relative difference of the gradient on the ranks of `step` from that on one rank. Collective.

    Computed in float64 on a smaller grid. In float32 the order of the sums over all points would dominate the
    difference.
    """
    together, alone = (TrainingStep(comm, (EXACT, EXACT), dtype=torch.float64) for comm in (step.comm, MPI.COMM_SELF))
    together.seconds()
    alone.seconds()
    return float((together.gradient - alone.gradient).norm() / alone.gradient.norm())


def report(
    parts: Mapping[tuple[str, int], Parts],
    seconds: Mapping[tuple[str, int], float],
    differences: Mapping[int, float],
    model: CostModel | None,
    used: int,
    part: tuple[int, int],
) -> Report:
    """Return rows and checks from the measurements, the same on all ranks.

    `used` is the total number of cores, and `part` the shape of a rank's part.
    """
    size = max(ranks for _, ranks in parts)
    single = seconds["strong", 1]
    rows = []
    for (kind, ranks), found in parts.items():
        base = single if kind == "strong" else ranks * seconds["weak", 1]
        predicted = None if model is None else model.predict(found.shape, found.processes, one_node=True)
        rows.append(_row(kind, ranks, found.shape, found, base, predicted))
    points = parts["strong", 1].shape
    if size > 1:
        rows.append(_row("no messages", size, part, _whole(size, seconds["independent", size]), single))
    for name, called in (("threads", "one process"), ("torchdiffeq", "torchdiffeq")):
        if (name, 1) in seconds:
            called += f", {used} thread{'s' * (used > 1)}"
            rows.append(_row(called, used, points, _whole(used, seconds[name, 1]), single))
    checks = [
        Check(f"gradient on {ranks} ranks less that on one, float64, relative", difference, LARGEST_GRADIENT_DIFFERENCE)
        for ranks, difference in differences.items()
    ]
    taken = parts["strong", size]
    if size > 1 and used >= size:
        checks += [
            Check(f"speed-up on {size} ranks", single / taken.seconds, EFFICIENCY * size, at_least=True),
            Check(f"time over that of one process with {used} threads", taken.seconds / seconds["threads", 1], 1.0),
            Check(f"time over torchdiffeq's with {used} threads", taken.seconds / seconds["torchdiffeq", 1], 1.0),
        ]
    notes = [
        f"Seconds of {STEPS} RK4 steps, loss and gradient, float32; least of interleaved rounds, slowest rank.",
        "halo, sum: all exchanges and the gradient's sum, each measured alone; work: the rest, with waiting. "
        "no messages: each rank its part of the work, for itself: what the machine allows.",
    ]
    if model is not None:
        off = abs(model.predict(taken.shape, taken.processes, one_node=True).seconds / taken.seconds - 1)
        checks.append(Check(f"prediction for {size} ranks off by", off, PREDICTION_ERROR))
        rows += _projected(model, points, part, single, seconds["weak", 1])
        network = model.network
        notes.append(
            f"Model: latency {1e6 * network.latency:.3g} us and {1e-9 * network.bandwidth:.3g} GB/s between two ranks, "
            f"work times {model.contention:.3g} where all cores work, {model.cores} cores. projected: every rank has a "
            "core of its own, and a network with this latency and bandwidth."
        )
        if size > used:
            notes.append(f"{size} ranks share {used} cores: no speed-up beyond {used} is to be expected.")
    return Report("scaling", rows, checks, notes)


def _whole(ranks: int, seconds: float) -> Parts:
    return Parts(ranks, (0, 0), (), seconds, math.nan, math.nan)


def _row(
    what: str, ranks: int, shape: Sequence[int], found: Parts, single: float, predicted: Prediction | None = None
) -> Row:
    speed_up = single / found.seconds
    return {
        "what": what,
        "ranks": ranks,
        "grid": "x".join(map(str, shape)),
        "seconds": found.seconds,
        "work": found.work,
        "halo": found.halo,
        "sum": found.gradient_sum,
        "speed-up": speed_up,
        "efficiency": speed_up / ranks,
        "predicted": math.nan if predicted is None else predicted.seconds,
    }


def _projected(
    model: CostModel, points: tuple[int, int], part: tuple[int, int], single: float, single_part: float
) -> list[Row]:
    """Project strong and weak scaling to more ranks. Under weak scaling a rank's part keeps its measured size."""
    rows = []
    for kind in ("strong", "weak"):
        for ranks in PROJECTED:
            processes = squarest(ranks)
            shape = points if kind == "strong" else (part[0] * processes[0], part[1] * processes[1])
            base = single if kind == "strong" else ranks * single_part
            found = model.predict(shape, processes, one_node=False)
            parts = Parts(ranks, shape, processes, found.seconds, found.halo, found.gradient_sum)
            rows.append(_row(f"projected {kind}", ranks, shape, parts, base, found))
    return rows
