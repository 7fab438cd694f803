"""The two experiments of `pnode-dist bench methods`, on data that is drawn: images, and a continuous normalizing flow.

They are those of the PNODE paper in small, all in float64: the parameters' own type is PETSc's then, every way computes
the same numbers, and their memory compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.nn.concat_squash import ConcatSquashPerceptron
from pnode_dist.problems.flows.model import FlowDynamics, Parts, standard_normal
from pnode_dist.problems.images.model import SqueezeNext

MakeSolve = Callable[[nn.Module], nn.Module]
"""Makes of a right-hand side f(t, u) the block u(0) -> u(1)."""

_POINTS, _COLOURS, _CLASSES = 32, 3, 10


@dataclass(frozen=True)
class Experiment:
    """`build(solve)` is a model with its data, whose call without arguments is the loss; `steps` are those compared."""

    name: str
    build: Callable[[MakeSolve], nn.Module]
    steps: tuple[int, ...]


class _ImagesLoss(nn.Module):
    def __init__(self, solve: MakeSolve, samples: int, stem: int, widths: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.images = torch.randn(samples, _POINTS, _POINTS, _COLOURS, dtype=torch.float64)
        self.labels = torch.arange(samples) % _CLASSES
        self.network = SqueezeNext(
            _COLOURS, _CLASSES, lambda func: _Contiguous(solve(func)), stem=stem, widths=widths, features=features
        ).double()

    def forward(self) -> torch.Tensor:
        return functional.cross_entropy(self.network(self.images), self.labels)


class _Contiguous(nn.Module):
    """A block that starts from a contiguous state, whose steps then are so as well, whoever takes them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(state.contiguous())
        return found


class _WithNoise(nn.Module):
    """The right-hand side of a flow with noise that stays the same, for Hutchinson's estimate of the trace."""

    noise: torch.Tensor

    def __init__(self, dynamics: FlowDynamics, noise: torch.Tensor) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.register_buffer("noise", noise)

    def forward(self, t: torch.Tensor, state: Parts) -> Parts:
        found: Parts = self.dynamics(t, state, self.noise)
        return found


class _FlowLoss(nn.Module):
    """Nats for each sample, of flows one after another (FFJORD)."""

    def __init__(self, solve: MakeSolve, samples: int, dimension: int, hidden: tuple[int, ...], flows: int) -> None:
        super().__init__()
        self.samples = torch.randn(samples, dimension, dtype=torch.float64, requires_grad=True)
        noise = torch.randint(0, 2, (samples, dimension)).double() * 2 - 1
        widths = (dimension, *hidden, dimension)
        self.dynamics = [FlowDynamics(ConcatSquashPerceptron(widths, "tanh"), dimension) for _ in range(flows)]
        self.solves = nn.ModuleList(solve(_WithNoise(dynamics, noise)) for dynamics in self.dynamics)

    def forward(self) -> torch.Tensor:
        state = self.dynamics[0].start(self.samples)
        for solve in self.solves:
            state = solve(state)
        base, change = state
        return -(standard_normal(base) - change).mean()


def images(steps: tuple[int, ...], samples: int, stem: int, widths: tuple[int, ...], features: int) -> Experiment:
    """Images of the shape of CIFAR's through SqueezeNext with a block for each of `widths`."""
    return Experiment("images", lambda solve: _ImagesLoss(solve, samples, stem, widths, features), steps)


def flow(steps: tuple[int, ...], samples: int, dimension: int, hidden: tuple[int, ...], flows: int) -> Experiment:
    """Samples through continuous flows, with Hutchinson's estimate: the state is (z, log p)."""
    return Experiment("flow", lambda solve: _FlowLoss(solve, samples, dimension, hidden, flows), steps)
