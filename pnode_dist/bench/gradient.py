"""One loss and its gradient through 100 or 20 steps of RK4, compared with torchdiffeq and plain torch.

The work matches the training of a small neural ODE. The loss is the sum of squares of the final state. It is
differentiated with respect to the initial state and the parameters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.bench.report import Check, Report, Row, interleaved
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import NeuralODE

LARGEST_TIME_RATIO = 1.0
LARGEST_GRADIENT_ERROR = 1e-12
_REPEATS = 7
_END = 1.0

Solve = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A batch of states of `dimension`, a right-hand side with one hidden layer, and a number of RK4 steps."""

    batch: int
    dimension: int
    hidden: int
    steps: int

    @property
    def name(self) -> str:
        """`batch x dimension x hidden, steps`."""
        return f"{self.batch}x{self.dimension}x{self.hidden}, {self.steps} steps"


CASES = (Case(16, 2, 16, 100), Case(256, 2, 64, 100), Case(512, 64, 256, 20))


class RightHandSide(nn.Module):
    """An autonomous multilayer perceptron, du/dt = W2 tanh(W1 u + b1) + b2."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(case.dimension, case.hidden, dtype=torch.float64),
            nn.Tanh(),
            nn.Linear(case.hidden, case.dimension, dtype=torch.float64),
        )

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        result: torch.Tensor = self.layers(u)
        return result


def classical_rk4(func: Solve, u0: torch.Tensor, steps: int) -> torch.Tensor:
    """Solve by Kutta's classical method in plain torch, independent of PETSc's implementation."""
    h = _END / steps
    u = u0
    for step in range(steps):
        t = torch.tensor(step * h, dtype=u.dtype)
        k1 = func(t, u)
        k2 = func(t + h / 2, u + h / 2 * k1)
        k3 = func(t + h / 2, u + h / 2 * k2)
        k4 = func(t + h, u + h * k3)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return u


def run() -> Report:
    """Measure all cases on one thread of one rank."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench gradient runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    try:
        import torchdiffeq
    except ImportError:
        raise ConfigurationError("bench gradient compares with torchdiffeq, which is not installed") from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, checks = [], []
        for case in CASES:
            row = measure(case, torchdiffeq.odeint, torchdiffeq.odeint_adjoint)
            rows.append(row)
            checks += [
                Check(f"time over torchdiffeq adjoint's, {case.name}", float(row["over_adjoint"]), LARGEST_TIME_RATIO),
                Check(f"gradient error, {case.name}", float(row["gradient_error"]), LARGEST_GRADIENT_ERROR),
            ]
    finally:
        torch.set_num_threads(threads)
    notes = (
        f"Seconds for one loss and gradient, float64, 1 thread, median of {_REPEATS} interleaved repeats.",
        "gradient_error: relative, against back-propagation through the classical RK4 in plain torch.",
        "torchdiffeq's rk4 is Kutta's 3/8 rule: as many stages, other coefficients, so only its time compares.",
    )
    return Report("gradient", rows, checks, notes)


def measure(case: Case, odeint: Callable[..., torch.Tensor], odeint_adjoint: Callable[..., torch.Tensor]) -> Row:
    """Measure the seconds of each gradient method, and the relative error of this project's."""
    torch.manual_seed(0)
    func = RightHandSide(case)
    u0 = torch.randn(case.batch, case.dimension, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, _END], dtype=torch.float64)
    step = _END / case.steps
    node = NeuralODE(func, method="rk4", step_size=step, trajectory=CheckpointBudget(ram="1GiB"))
    options = {"step_size": step}
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "pnode_dist": lambda: node(u0, times)[-1],
        "torchdiffeq_adjoint": lambda: odeint_adjoint(func, u0, times, method="rk4", options=options)[-1],
        "torchdiffeq_backprop": lambda: odeint(func, u0, times, method="rk4", options=options)[-1],
    }
    inputs = [u0, *func.parameters()]
    reference = _gradient(lambda: classical_rk4(func, u0, case.steps), inputs)
    error = (_gradient(ways["pnode_dist"], inputs) - reference).norm() / reference.norm()
    candidates = {name: _timed(way, inputs) for name, way in ways.items()}
    interleaved(candidates, 1)
    seconds = {name: statistics.median(values) for name, values in interleaved(candidates, _REPEATS).items()}
    row: Row = {"case": case.name, **seconds}
    row["over_adjoint"] = seconds["pnode_dist"] / seconds["torchdiffeq_adjoint"]
    row["over_backprop"] = seconds["pnode_dist"] / seconds["torchdiffeq_backprop"]
    row["gradient_error"] = error.item()
    return row


def _gradient(solve: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(solve().square().sum(), inputs)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _timed(solve: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], float]:
    def once() -> float:
        began = time.perf_counter()
        torch.autograd.grad(solve().square().sum(), inputs)
        return time.perf_counter() - began

    return once
