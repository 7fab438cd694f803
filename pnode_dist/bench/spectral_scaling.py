"""Strong and weak scaling of a training step with Fourier transforms, a part of `bench scaling`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from mpi4py import MPI

from pnode_dist.bench.cost_model import Network, Prediction, Work
from pnode_dist.bench.report import Check, Row
from pnode_dist.bench.some_ranks import on_first
from pnode_dist.bench.spectral_model import SpectralModel
from pnode_dist.bench.spectral_step import STAGES, STEPS, TRANSFORMED, SpectralStep

LARGEST_GRADIENT_DIFFERENCE = 1e-12
PREDICTION_ERROR = 0.25
EXACT = 48
PROJECTED = (4, 16, 64, 256, 1024)
PROJECTED_POINTS = 2048
_SLAB, _COPIES = (512, 1024, 4), 5
_SMALLER = (8, 4, 2, 1)


@dataclass(frozen=True)
class Measured:
    """Rows and checks of the step on some numbers of ranks, and the projection."""

    rows: Sequence[Row]
    checks: Sequence[Check]
    notes: Sequence[str]


def measured(
    comm: MPI.Intracomm, counts: Sequence[int], points: int, rounds: int, network: Network | None, cores: int
) -> Measured:
    """Measure on the first 1, 2, 4, ... ranks of `comm`, and project. Collective.

    `network` has latency and bandwidth between two ranks, None on one rank.
    """
    part = points // comm.size
    steps: dict[tuple[str, int], SpectralStep] = {}
    for ranks in counts:
        subset = comm.Split(0 if comm.rank < ranks else MPI.UNDEFINED, comm.rank)
        if subset != MPI.COMM_NULL:
            steps["strong", ranks] = SpectralStep(subset, (points, points))
            steps["weak", ranks] = SpectralStep(subset, (part * ranks, points))
    small = {n: SpectralStep(MPI.COMM_SELF, (max(points // n, 4), points)) for n in _SMALLER}
    alone = SpectralStep(MPI.COMM_SELF, (part, points))
    tasks: dict[tuple[str, int], tuple[int, Callable[[], float]]] = {}
    for kind in ("strong", "weak"):
        for ranks in counts:
            tasks[kind, ranks] = ranks, partial(_of, steps, (kind, ranks), SpectralStep.seconds)
    for n, step in small.items():
        tasks["slab", n] = 1, step.seconds
    tasks["independent", comm.size] = comm.size, alone.seconds
    least: dict[tuple[str, int], float] = {}
    for _ in range(rounds + 1):
        for key, (ranks, work) in tasks.items():
            least[key] = min(least.get(key, math.inf), on_first(comm, ranks, work))
    transposes = {
        key: on_first(comm, key[1], partial(_of, steps, key, SpectralStep.transpose_seconds))
        for key in tasks
        if key[0] in ("strong", "weak")
    }
    differences = {
        ranks: on_first(comm, ranks, partial(_of, steps, ("strong", ranks), gradient_difference))
        for ranks in counts[1:]
    }
    model = None
    if network is not None:
        known = {step.state.shape[0] * points: least["slab", n] for n, step in small.items()}
        shared = max(1.0, comm.size / cores)
        model = SpectralModel(
            Work(tuple(known.items())),
            STEPS * STAGES * TRANSFORMED,
            mode_bytes=8,
            gradient_bytes=4 * len(list(alone.func.parameters())),
            network=network,
            packing=on_first(comm, 1, packing_seconds),
            contention=max(1.0, least["independent", comm.size] / least["weak", 1] / shared),
            cores=cores,
        )
    rows: list[Row] = []
    for (kind, ranks), spent in transposes.items():
        shape = (points, points) if kind == "strong" else (part * ranks, points)
        base = least["strong", 1] if kind == "strong" else ranks * least["weak", 1]
        predicted = None if model is None else model.predict(shape, ranks, one_node=True)
        rows.append(_row(kind, ranks, shape, least[kind, ranks], spent, base, predicted))
    checks = [
        Check(f"spectral gradient on {ranks} ranks less that on one, float64", value, LARGEST_GRADIENT_DIFFERENCE)
        for ranks, value in differences.items()
    ]
    if model is not None:
        taken = least["strong", comm.size]
        off = abs(model.predict((points, points), comm.size, one_node=True).seconds / taken - 1)
        checks.append(Check(f"spectral prediction for {comm.size} ranks off by", off, PREDICTION_ERROR))
        rows += projected(model, (part, points))
    notes = (
        f"spectral: two-layer quasi-geostrophic flow, seconds of {STEPS} RK4 steps, loss and gradient, float32. "
        f"transposes: all of them, each measured alone; {len(TRANSFORMED)} transforms in each evaluation.",
    )
    return Measured(rows, checks, notes)


def _of(
    steps: dict[tuple[str, int], SpectralStep], key: tuple[str, int], measure: Callable[[SpectralStep], float]
) -> float:
    """Apply `measure` to a step. Only the ranks that take part hold the step."""
    return measure(steps[key])


def gradient_difference(step: SpectralStep) -> float:
    """Return the relative difference of the gradient on the ranks of `step` from that on one rank. Collective.

    Computed in float64 on a smaller grid. It is the largest one of all parameters.
    """
    together, alone = (SpectralStep(comm, (EXACT, EXACT), torch.float64) for comm in (step.comm, MPI.COMM_SELF))
    together.seconds()
    alone.seconds()
    return float((together.gradient / alone.gradient - 1).abs().max())


def packing_seconds() -> float:
    """Return the seconds to pack a byte of a slab's columns into a message, and to unpack one of its rows."""
    slab = torch.zeros(*_SLAB, dtype=torch.complex64)
    columns = slab[:, : _SLAB[1] // 2]
    fastest = math.inf
    for _ in range(_COPIES):
        began = time.perf_counter()
        message = columns.contiguous()
        columns.copy_(message)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest / (columns.numel() * columns.element_size())


def projected(model: SpectralModel, part: tuple[int, int]) -> list[Row]:
    """Project strong scaling of a large grid, and weak scaling of a rank's `part`, as far as there are slabs."""
    rows: list[Row] = []
    strong = (PROJECTED_POINTS, PROJECTED_POINTS)
    for kind in ("strong", "weak"):
        for ranks in PROJECTED:
            power = ranks.bit_length() - 1
            shape = strong if kind == "strong" else (part[0] * 2 ** (power - power // 2), part[1] * 2 ** (power // 2))
            if ranks > model.most_ranks(shape):
                continue
            single = (strong if kind == "strong" else part), 1
            base = model.predict(*single, one_node=False).seconds * (1 if kind == "strong" else ranks)
            found = model.predict(shape, ranks, one_node=False)
            rows.append(_row(f"projected {kind}", ranks, shape, found.seconds, found.halo, base, found))
    return rows


def _row(
    what: str,
    ranks: int,
    shape: tuple[int, int],
    seconds: float,
    transposes: float,
    single: float,
    predicted: Prediction | None,
) -> Row:
    return {
        "what": what,
        "ranks": ranks,
        "grid": "x".join(map(str, shape)),
        "seconds": seconds,
        "work": seconds - transposes,
        "transposes": transposes,
        "speed-up": single / seconds,
        "efficiency": single / seconds / ranks,
        "predicted": math.nan if predicted is None else predicted.seconds,
    }
