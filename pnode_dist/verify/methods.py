"""The gradient of every method against central differences, on a small stiff problem spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.nn import Conv2d
from pnode_dist.ode.methods import METHODS, Method, adjoint_here, has_adjoint
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.separable import Separable
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.partition.grid import GridPartition
from pnode_dist.verify.gradcheck import GradcheckCase, gradcheck, state_direction

LARGEST_ERROR = 1e-7
_SHAPE, _CHANNELS = (4, 6), 2
_TIMES = [0.0, 0.1]
_TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15}
_RATES = (1.0, 10.0)


class _Decay(nn.Module):
    """The stiff part: decay at rates from 1 to 10, with a drive."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(*_RATES, _CHANNELS, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.cos(t) - self.rates * (u + u**3 / 10)


class _Neighbours(nn.Module):
    """The part with halo exchanges: a convolution and its nonlinearity."""

    def __init__(self, grid: GridPartition) -> None:
        super().__init__()
        self.convolution = Conv2d(grid, _CHANNELS, _CHANNELS, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.tanh(self.convolution(u))
        return values


class _Sum(nn.Module):
    """The sum of both parts as one function."""

    def __init__(self, stiff: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.stiff, self.other = stiff, other

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.stiff(t, u) + self.other(t, u)
        return values


def check_methods(mesh: Mesh, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a row of facts for each method, with the relative error of its gradient against central differences.

    The error is None for methods without an adjoint in the installed PETSc. Collective on the world.
    """
    grid = GridPartition(mesh, _SHAPE, _CHANNELS, ("replicate", "periodic"))
    for method in METHODS.values():
        row: dict[str, Any] = {
            "method": method.name,
            "order": method.order,
            "stages": method.stages,
            "stiffly accurate": method.stiffly_accurate,
            "adjoint": adjoint_here(method),
        }
        error = gradcheck(_case(method, grid, seed), mesh, seed).relative_error if has_adjoint(method) else None
        yield {**row, "gradient error": error}


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Return the failures of gradients, one sentence each."""
    return [
        f"{row['method']}: relative error {row['gradient error']:.3g} is above {LARGEST_ERROR:g}"
        for row in rows
        if row["gradient error"] is not None and not row["gradient error"] <= LARGEST_ERROR
    ]


def _case(method: Method, grid: GridPartition, seed: int) -> GradcheckCase:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stiff, other = _Decay(), _Neighbours(grid)
    if method.family == "symplectic":
        return _case_of_pairs(method, grid, seed, Separable(position=stiff, momentum=other))
    func = SplitFunction(implicit=stiff, explicit=other) if method.family == "arkimex" else _Sum(stiff, other)
    options = _TIGHT if method.implicit else None
    node = NeuralODE(func, method=method.name, partition=grid, options=options)
    weights = state_direction(grid, (len(_TIMES),), seed + 1)

    def loss(state: torch.Tensor) -> torch.Tensor:
        share: torch.Tensor = (node(state, _TIMES) * weights).sum()
        return share

    state = state_direction(grid, (), seed).requires_grad_()
    return GradcheckCase(state, loss, tuple(node.parameters()), grid)


def _case_of_pairs(method: Method, grid: GridPartition, seed: int, func: Separable) -> GradcheckCase:
    """Return the case of a state (q, p), whose two parts lie along the first axis of one tensor."""
    node = NeuralODE(func, method=method.name, partition=grid)
    weights = state_direction(grid, (2, len(_TIMES)), seed + 1)

    def loss(state: torch.Tensor) -> torch.Tensor:
        share: torch.Tensor = (torch.stack(node((state[0], state[1]), _TIMES)) * weights).sum()
        return share

    state = state_direction(grid, (2,), seed).requires_grad_()
    return GradcheckCase(state, loss, tuple(node.parameters()), grid)
