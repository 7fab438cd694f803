"""Effect of the floating dtype of f: seconds of a loss and its gradient, and the error of the gradient.

State, parameters, steps and adjoint stay in float64 (`compute_dtype` of `NeuralODE`). In one row, state and parameters
are float32 as well.
"""

from __future__ import annotations

import torch
from mpi4py import MPI

from pnode_dist.bench.report import Check, Report, Row, interleaved
from pnode_dist.bench.training_step import TrainingStep
from pnode_dist.errors import ConfigurationError

LEAST_SPEED_UP = 8.0
LARGEST_ERROR = {"float32": 3e-4, "bfloat16": 5e-3, "all in float32": 3e-4}
POINTS = 256
STEPS = 1
REPEATS = 3


def run() -> Report:
    """Measure on one thread of one rank."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench precision runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured((POINTS, POINTS), REPEATS)
    finally:
        torch.set_num_threads(threads)


def measured(shape: tuple[int, int], repeats: int) -> Report:
    """Return the report for a grid of `shape`: least of `repeats` interleaved repeats."""
    double = torch.float64
    ways = {
        "float64": TrainingStep(MPI.COMM_SELF, shape, STEPS, double),
        "float32": TrainingStep(MPI.COMM_SELF, shape, STEPS, double, torch.float32),
        "bfloat16": TrainingStep(MPI.COMM_SELF, shape, STEPS, double, torch.bfloat16),
        "all in float32": TrainingStep(MPI.COMM_SELF, shape, STEPS, torch.float32),
    }
    seconds = {
        name: min(found)
        for name, found in interleaved({name: way.seconds for name, way in ways.items()}, repeats).items()
    }
    exact = ways["float64"].gradient
    errors = {name: float((way.gradient.double() - exact).norm() / exact.norm()) for name, way in ways.items()}
    return report(shape, seconds, errors)


def report(shape: tuple[int, int], seconds: dict[str, float], errors: dict[str, float]) -> Report:
    """Return rows and checks from the seconds of each variant and the relative errors of their gradients."""
    double = seconds["float64"]
    rows: list[Row] = [
        {
            "f in": name,
            "grid": "x".join(map(str, shape)),
            "seconds": found,
            "times as fast": double / found,
            "gradient error": errors[name],
        }
        for name, found in seconds.items()
    ]
    checks = [Check("float32, times as fast as float64", double / seconds["float32"], LEAST_SPEED_UP, at_least=True)]
    checks += [Check(f"gradient error, {name}", errors[name], largest) for name, largest in LARGEST_ERROR.items()]
    notes = (
        f"Seconds of {STEPS} RK4 step, loss and gradient, of three convolutions with 16 channels, 1 thread, least of "
        f"{REPEATS} interleaved repeats; errors relative to the gradient in float64.",
    )
    return Report("precision", rows, checks, notes)
