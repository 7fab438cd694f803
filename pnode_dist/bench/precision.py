"""Effect of the floating types of f and state: time of a loss and its gradient, and the error of the gradient.

The first table has f in several types on one network, with state, parameters, steps and adjoint in float64
(`compute_dtype` of `NeuralODE`). In one row, state and parameters are float32 as well. The second table has f and
parameters in float32 on several problems, with the state in float32 and in float64 (`state_dtype`), beside plain torch
in float32. Its errors are relative to the gradient of plain torch in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.bench.peers.cases import PeerCase, arrays_of, case_of
from pnode_dist.bench.peers.torch_worker import FUNCTIONS, plain_torch
from pnode_dist.bench.report import Check, Report, Row, interleaved
from pnode_dist.bench.training_step import TrainingStep
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import NeuralODE

LEAST_SPEED_UP = 8.0
LARGEST_ERROR = {"float32": 3e-4, "bfloat16": 5e-3, "all in float32": 3e-4}
LARGEST_ERROR_OVER_PLAIN = 2.0
POINTS = 256
STEPS = 1
REPEATS = 3
PROBLEMS = (
    replace(case_of("tiny"), dtype="float32"),
    replace(case_of("tiny"), name="tiny, many steps", dtype="float32", steps=2000, rounds=1),
    case_of("medium"),
    case_of("convolution"),
    case_of("flow"),
)
PLAIN, NARROW, WIDE = "plain torch", "state in float32", "state in float64"
Solve = Callable[[torch.Tensor], torch.Tensor]
Gradient = Callable[[], torch.Tensor]


def run() -> Report:
    """Measure on one thread of one rank."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench precision runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        of_f = measured((POINTS, POINTS), REPEATS)
        of_state, checks = states(PROBLEMS)
    finally:
        torch.set_num_threads(threads)
    notes = (
        *of_f.notes,
        "f and state: f and parameters in float32; least processor time of a loss and its gradient in interleaved "
        "repeats, over that of plain torch in float32; errors relative to the gradient of plain torch in float64.",
    )
    return replace(of_f, checks=[*of_f.checks, *checks], notes=notes, further={"f and state": of_state})


def states(problems: Sequence[PeerCase]) -> tuple[list[Row], list[Check]]:
    """Return a row for each problem and type of the state, and checks of the gradients with a float32 state."""
    rows: list[Row] = []
    checks = []
    for problem in problems:
        seconds, errors = costs_and_errors(problem)
        rows += [
            {
                "problem": problem.name,
                "steps": problem.steps,
                "solver": name,
                "time": seconds[name] / seconds[PLAIN],
                "gradient error": errors[name],
            }
            for name in seconds
        ]
        ratio = errors[NARROW] / errors[PLAIN]
        checks.append(Check(f"gradient error over plain float32's, {problem.name}", ratio, LARGEST_ERROR_OVER_PLAIN))
    return rows, checks


def costs_and_errors(problem: PeerCase) -> tuple[dict[str, float], dict[str, float]]:
    """Return the least processor seconds of a loss and its gradient, and the relative error of the gradient."""
    func, u0 = _made(problem, np.float32)
    ways: dict[str, Gradient] = {PLAIN: _gradient(lambda u: plain_torch(problem)(func, u), func, u0)}
    for name, state_dtype in ((NARROW, torch.float32), (WIDE, torch.float64)):
        ways[name] = _gradient(_ours(problem, func, state_dtype), func, u0)
    double, start = _made(problem, np.float64)
    exact = _gradient(lambda u: plain_torch(problem)(double, u), double, start)()
    errors = {name: float((way().double() - exact).norm() / exact.norm()) for name, way in ways.items()}
    found = interleaved({name: _timed(way) for name, way in ways.items()}, problem.rounds)
    return {name: min(seconds) for name, seconds in found.items()}, errors


def _made(problem: PeerCase, dtype: type[np.floating[Any]]) -> tuple[nn.Module, torch.Tensor]:
    """Return the right-hand side and the initial state in `dtype`, of the same values in every type."""
    arrays = {name: array.astype(dtype) for name, array in arrays_of(problem).items()}
    return FUNCTIONS[problem.kind](arrays), torch.from_numpy(arrays["u0"]).requires_grad_()


def _ours(problem: PeerCase, func: nn.Module, state_dtype: torch.dtype) -> Solve:
    node = NeuralODE(
        func,
        method=problem.method,
        step_size=problem.size,
        trajectory=CheckpointBudget(ram="4GiB"),
        state_dtype=state_dtype,
        last_only=True,
    )
    return lambda u: node(u, [0.0, problem.end])


def _gradient(solve: Solve, func: nn.Module, u0: torch.Tensor) -> Gradient:
    def gradient() -> torch.Tensor:
        found = torch.autograd.grad(solve(u0).square().mean(), [u0, *func.parameters()])
        return torch.cat([part.reshape(-1) for part in found])

    return gradient


def _timed(gradient: Gradient) -> Callable[[], float]:
    def seconds() -> float:
        began = time.process_time()
        gradient()
        return time.process_time() - began

    return seconds


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
