"""Right-hand sides that depend on more than (t, u, parameters), and plain steps of them that autograd goes through.

Each trait is one thing beside its arguments that f reads, draws or changes. `BETWEEN` are things that a program does
between the forward and the backward pass.
"""

from __future__ import annotations

import contextlib
import random as python_random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.oracles.runge_kutta import TABLEAUX

SIZE = 3
FACTOR: Any = 1.0


class Settings:
    """Settings of a program's: an attribute, and one of the class, which no capture holds."""

    shared = 1.0

    def __init__(self) -> None:
        self.factor = 1.0


class Impure(nn.Module):
    """tanh(W u + b) times and plus what the traits say."""

    def __init__(self, traits: Sequence[str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        layer = nn.Linear(SIZE, SIZE, dtype=torch.float64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if "spectral norm" in traits:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                layer = torch.nn.utils.spectral_norm(layer)
        self.layer = layer
        self.norm = nn.BatchNorm1d(SIZE, dtype=torch.float64) if "batch norm" in traits else nn.Identity()
        self.dropout = nn.Dropout(0.4 if "dropout" in traits else 0.0)
        self.traits = frozenset(traits)
        self.frozen = nn.Parameter(torch.ones(SIZE, dtype=torch.float64), requires_grad=False)
        self.register_buffer("memory", torch.ones(SIZE, dtype=torch.float64))
        self.register_buffer("rebound", torch.ones(SIZE, dtype=torch.float64))
        self.scale: Any = 1.0
        self.calls = 0
        self.table = {"scale": 1.0, "list": [1.0]}
        self.settings = Settings()
        self.array = np.ones(SIZE)
        self.plain = torch.ones(SIZE, dtype=torch.float64)
        self.generator = np.random.default_rng(5)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        traits = self.traits
        value = torch.tanh(self.dropout(self.norm(self.layer(u)))) * torch.cos(t)
        value = value * self.scale * self.table["scale"] * self.table["list"][0] * FACTOR  # type: ignore[index]
        value = value * self.settings.factor * Settings.shared * self.frozen * self.plain
        if "noise" in traits:
            value = value + 0.3 * torch.randn(u.shape, dtype=u.dtype)
        if "memory in place" in traits:
            value = value * self.memory.clone()
            self.memory.mul_(0.95).add_(0.01 * u.detach().mean())
        if "memory rebound" in traits:
            value = value * self.rebound
            self.rebound = 0.95 * self.rebound + 0.01 * u.detach().mean()
        if "counter" in traits:
            self.calls += 1
            value = value * (1.0 + 0.1 * (self.calls % 5))
        if "array" in traits:
            value = value * torch.tensor(self.array)
        if "numpy draws" in traits:
            value = value * (1.0 + 0.1 * self.generator.random())
        if "python draws" in traits:
            value = value * (1.0 + 0.1 * python_random.random())
        if "late draws" in traits and float(t) > 0.5:
            value = value * (1.0 + 0.1 * torch.rand((), dtype=u.dtype))
        return value


TRAITS = (
    "dropout", "noise", "spectral norm", "batch norm", "memory in place", "memory rebound", "counter", "array",
    "numpy draws", "python draws", "late draws",
)  # fmt: skip


def _rebind_global(value: Any) -> None:
    global FACTOR
    FACTOR = value


def _evaluate(func: Impure) -> None:
    func(torch.tensor(0.2, dtype=torch.float64), torch.rand(4, SIZE, dtype=torch.float64))


def _fill(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.fill_(value)


BETWEEN: dict[str, Callable[[Impure], object]] = {
    "eval": lambda f: f.eval(),
    "attribute": lambda f: setattr(f, "scale", 2.0),
    "entry of a dictionary": lambda f: f.table.update(scale=3.0),
    "entry of a list": lambda f: f.table["list"].__setitem__(0, 2.0),  # type: ignore[attr-defined]
    "attribute of an object": lambda f: setattr(f.settings, "factor", 0.5),
    "class attribute": lambda f: setattr(Settings, "shared", 1.5),
    "global": lambda f: _rebind_global(2.0),
    "array in place": lambda f: f.array.fill(3.0),
    "frozen parameter in place": lambda f: _fill(f.frozen, 2.0),
    "buffer in place": lambda f: _fill(f.memory, 2.0),
    "plain tensor in place": lambda f: _fill(f.plain, 2.0),
    "data of a buffer": lambda f: f.memory.data.fill_(2.0),
    "buffer rebound": lambda f: setattr(f, "rebound", torch.full((SIZE,), 2.0, dtype=torch.float64)),
    "parameter replaced": lambda f: setattr(f.layer, "bias", nn.Parameter(torch.ones(SIZE, dtype=torch.float64))),
    "layer replaced": lambda f: setattr(f, "dropout", nn.Identity()),
    "random state": lambda f: torch.manual_seed(99),
    "default type": lambda f: torch.set_default_dtype(torch.float64),
    "another forward pass": lambda f: (
        f(torch.tensor(0.2, dtype=torch.float64), torch.ones(4, SIZE, dtype=torch.float64)).sum() and None
    ),
}
PRECISIONS = ("none", "autocast round the forward pass", "autocast round both", "autocast round the backward pass")


def restore_globals() -> None:
    """Undo what `BETWEEN` does to the process."""
    _rebind_global(1.0)
    Settings.shared = 1.0
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def autocast(on: bool) -> Any:
    """bfloat16 on the host. Casts are not shared by evaluations, whose gradients would be summed in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on, cache_enabled=False):
        yield


def plain_steps(func: Callable[..., torch.Tensor], u: torch.Tensor, steps: int, method: str) -> torch.Tensor:
    """Steps over [0, 1] as a plain loop, sums being formed in the state's type."""
    table = TABLEAUX[method]
    size = 1.0 / steps
    last = max(stage for stage, weight in enumerate(table.weights) if weight)
    for step in range(steps):
        slopes: list[torch.Tensor] = []
        for stage in range(last + 1):
            state = u
            for slope, weight in zip(slopes, table.stages[stage], strict=False):
                if weight:
                    state = torch.add(state, slope, alpha=size * float(weight))
            time = torch.tensor(step * size + float(table.nodes[stage]) * size, dtype=u.dtype)
            slopes.append(func(time, state))
        for slope, weight in zip(slopes, table.weights, strict=False):
            if weight:
                u = torch.add(u, slope, alpha=size * float(weight))
    return u
