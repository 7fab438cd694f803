"""The two experiments of `pnode-dist bench methods` on random data: images, and a continuous normalizing flow.

They repeat those of the PNODE paper at small size, all in float64. The dtype of the parameters is then PETSc's, every
gradient method computes the same numbers, and their memory is comparable.
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
"""Makes the block u(0) -> u(1) from a right-hand side f(t, u)."""

_POINTS, _COLOURS, _CLASSES = 32, 3, 10


@dataclass(frozen=True)
class Experiment:
    """A model to compare gradient methods on.

    `build(solve)` returns the model with its data. A call of the model without arguments returns the loss. `steps` are
    the numbers of steps to compare.
    """

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
    """Block that starts from a contiguous state, so that the steps of every gradient method are contiguous."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.block(state.contiguous())
        return found


class _WithNoise(nn.Module):
    """Right-hand side of a flow with fixed noise for Hutchinson's estimate of the trace."""

    noise: torch.Tensor

    def __init__(self, dynamics: FlowDynamics, noise: torch.Tensor) -> None:
        super().__init__()
        self.dynamics = dynamics
        self.register_buffer("noise", noise)

    def forward(self, t: torch.Tensor, state: Parts) -> Parts:
        found: Parts = self.dynamics(t, state, self.noise)
        return found


class _FlowLoss(nn.Module):
    """Nats per sample of consecutive flows (FFJORD)."""

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
    """Return the experiment of CIFAR-shaped images through SqueezeNext, with a block for each of `widths`."""
    return Experiment("images", lambda solve: _ImagesLoss(solve, samples, stem, widths, features), steps)


def flow(steps: tuple[int, ...], samples: int, dimension: int, hidden: tuple[int, ...], flows: int) -> Experiment:
    """Return the experiment of samples through continuous flows, by Hutchinson's estimate. The state is (z, log p)."""
    return Experiment("flow", lambda solve: _FlowLoss(solve, samples, dimension, hidden, flows), steps)
