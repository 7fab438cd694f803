"""The PNODE paper's experiments with every gradient method: time, memory, work and gradient errors.

H. Zhang, W. Zhao: A memory-efficient neural ordinary differential equation framework based on high-level adjoint
differentiation, IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298, figures of time and memory against steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI

from pnode_dist.bench.methods.accuracy import ITERATIONS, METHOD, STEPS, compare_while_training
from pnode_dist.bench.methods.baselines import TABLES
from pnode_dist.bench.methods.cell import (
    MOST_TIMES,
    REFERENCE,
    SAME_SPEED,
    SHARES,
    Candidate,
    Cell,
    Verdict,
    measure_cell,
    verdicts,
)
from pnode_dist.bench.methods.counts import Sizes, compare
from pnode_dist.bench.methods.experiments import Experiment, flow, images
from pnode_dist.bench.methods.gradient_methods import GRADIENT_METHODS
from pnode_dist.bench.methods.heap import RESOLUTION, uncollected
from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.errors import ConfigurationError

LARGEST_GRADIENT_ERROR = 1e-12
LEAST_SHARE_OF_CELLS = 0.8
SOLUTION_OVER_NAIVE = 0.25
MANY_STEPS = 50
ROUNDS = 4
SECONDS = 10.0
"""Least processor seconds of the rounds of a cell, up to the limit on rounds."""
SHORT = (
    images((2, 4), samples=32, stem=16, widths=(8, 16, 32, 64), features=32),
    flow((2, 4), samples=2048, dimension=6, hidden=(64, 64, 64), flows=2),
)
FULL = (
    images((2, 4, 8, 16), samples=32, stem=64, widths=(32, 64, 128, 256), features=128),
    flow((5, 10, 20, 40), samples=1000, dimension=6, hidden=(60, 60, 60), flows=5),
)
"""Networks of the paper: SqNxt_23_1x with 199,800 parameters in right-hand sides, and FFJORD's for POWER."""
_CHAIN = ("dopri5", 4, 5, 3)
"""Solver, blocks, steps and layers of the chain used for the counts."""


def run(full: bool = False) -> Report:
    """Measure on one thread of one rank: small networks in some 10 minutes, or with `full` the paper's in hours."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench methods runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cells = measure(FULL if full else SHORT, tuple(TABLES), ROUNDS)
        peaks = many_steps(SHORT[0])
        theory, wrong = theory_beside_counts()
        story = compare_while_training(list(GRADIENT_METHODS.values()))
    finally:
        torch.set_num_threads(threads)
    found = [verdict for cell in cells for verdict in verdicts(cell)]
    lost = [verdict for verdict in found if not verdict.holds]
    rows = [row for cell in cells for row in cell_rows(cell)]
    checks = [
        Check("largest gradient error of a reverse-accurate method", _largest_error(cells), LARGEST_GRADIENT_ERROR),
        Check(
            f"share of {len(found)} cells in which auto is as fast as the fastest baseline that fits",
            1 - len(lost) / len(found),
            LEAST_SHARE_OF_CELLS,
            at_least=True,
        ),
        Check(
            f"memory of solution over {REFERENCE}'s, {MANY_STEPS} steps of Dopri5 in each block",
            peaks["solution"] / peaks[REFERENCE],
            SOLUTION_OVER_NAIVE,
        ),
        Check("counts that differ from the theory", float(wrong), 0.0),
    ]
    method, blocks, steps, layers = _CHAIN
    further = {
        f"{len(lost)} of {len(found)} cells in which a baseline is faster in the same memory": [
            verdict_row(verdict) for verdict in lost
        ],
        f"theory and count: {method}, Nb = {blocks}, Nt = {steps}, Ns = {TABLES[method].stages}, Nl = {layers}": theory,
        f"relative gradient error, ReLU, {STEPS} steps of {METHOD}": story.errors,
        f"mean squared error in {ITERATIONS} iterations of training there": story.curves,
    }
    return Report("methods", rows, checks, notes(), further=further)


def measure(experiments: Sequence[Experiment], methods: Sequence[str], rounds: int) -> list[Cell]:
    """Measure all cells of the table."""
    # Exclude the memory that torch and its libraries allocate on first use and keep.
    for experiment in experiments:
        for name in (REFERENCE, "graph"):
            Candidate(experiment, GRADIENT_METHODS[name], "euler", 1).measure()
    with uncollected():
        return [
            measure_cell(experiment, method, steps, rounds, list(GRADIENT_METHODS.values()), SECONDS)
            for experiment in experiments
            for method in methods
            for steps in experiment.steps
        ]


def many_steps(experiment: Experiment) -> dict[str, int]:
    """Measure the peak memory of back-propagation and `solution` for many steps of Dopri5."""
    found = {}
    for name in (REFERENCE, "solution"):
        candidate = Candidate(experiment, GRADIENT_METHODS[name], "dopri5", MANY_STEPS)
        candidate.measure()
        found[name] = candidate.bytes
    return found


def theory_beside_counts() -> tuple[list[Row], int]:
    """Return rows of the paper's table, and the number of entries that differ from the counts."""
    method, blocks, steps, layers = _CHAIN
    return compare(method, Sizes(blocks, steps, TABLES[method].stages, layers))


def cell_rows(cell: Cell) -> list[Row]:
    """Return a row for each gradient method."""
    reference = cell.results[REFERENCE]
    return [
        {
            "experiment": cell.experiment,
            "solver": cell.method,
            "steps": cell.steps,
            "method": name,
            "ms": 1e3 * result.least,
            "x naive": result.least / reference.least,
            "MiB": result.bytes / 2**20,
            "of naive's": result.bytes / reference.bytes,
            "f forward": result.forward,
            "f backward": result.backward,
            "recomputed": result.again,
            "gradient error": result.error,
        }
        for name, result in cell.results.items()
    ]


def verdict_row(verdict: Verdict) -> Row:
    """Return the row of a verdict."""
    return {
        "experiment": verdict.experiment,
        "solver": verdict.method,
        "steps": verdict.steps,
        "of naive's memory": verdict.share,
        "fastest baseline": verdict.fastest,
        "x its time": verdict.ratio,
        "beside it": verdict.reason,
    }


def notes() -> tuple[str, ...]:
    """Return the notes that explain the report."""
    return (
        "Processor time of one loss and gradient, float64, 1 thread, the least of "
        f"{ROUNDS} to {MOST_TIMES * ROUNDS} interleaved rounds. MiB: the most memory in use beyond model, "
        "data and gradient, PETSc's vectors included.",
        "f forward, f backward: evaluations of f in the forward and in the backward pass; recomputed: steps. gradient "
        f"error: relative to {REFERENCE}'s.",
        "NODE-cont: continuous adjoint (torchdiffeq). NODE-naive: back-propagation. ANODE, ACA: a checkpoint for each "
        "block, for each step. The others are this project's; spilled: all but two checkpoints of a block on disk.",
        f"Cells: auto in {', '.join(f'{share:g}' for share in SHARES)} of {REFERENCE}'s memory. One holds where auto "
        f"takes at most {SAME_SPEED:g} of the time of the fastest of NODE-naive, ANODE and ACA that fits there, to the "
        f"resolution of the peak, {RESOLUTION:.2%}.",
        "theory: the product, its value, and what was counted. depth, recorded: layers of f; states: what is kept "
        "besides graphs and the blocks' own inputs and outputs.",
    )


def _largest_error(cells: Sequence[Cell]) -> float:
    return max(
        result.error for cell in cells for result in cell.results.values() if result.gradient_method.reverse_accurate
    )
