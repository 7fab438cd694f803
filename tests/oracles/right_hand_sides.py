"""Right-hand sides to solve with, and how gradients are taken and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class Network(nn.Module):
    """du/dt = W2 tanh(W1 u + b + t c): two layers, not autonomous, on the last axis of u."""

    def __init__(self, features: int = 3, hidden: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5)

        self.inner = parameter(hidden, features)
        self.bias = parameter(hidden)
        self.drift = parameter(hidden)
        self.outer = parameter(features, hidden)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ self.inner.T + self.bias + t * self.drift) @ self.outer.T


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(
    solve: Callable[[torch.Tensor], torch.Tensor],
    u0: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The solution of `solve(u0)` and the gradients of its weighted sum, by default of its sum of sines.

    In the order of: solution, with respect to u0, with respect to each of the parameters.
    """
    start = u0.detach().clone().requires_grad_()
    solution = solve(start)
    loss = torch.sin(solution).sum() if weight is None else (weight * solution).sum()
    found = torch.autograd.grad(loss, [start, *parameters], allow_unused=True)
    zeros = (torch.zeros_like(tensor) for tensor in (start, *parameters))
    return solution.detach(), *(z if g is None else g for g, z in zip(found, zeros, strict=True))


def distance(found: Any, wanted: Any) -> float:
    """The largest difference of two tensors, or sequences of them, relative to the largest entry wanted."""
    if isinstance(wanted, torch.Tensor):
        assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
        assert found.dtype == wanted.dtype, f"{found.dtype} is not {wanted.dtype}"
        if wanted.numel() == 0:
            return 0.0
        error = float((found.detach() - wanted.detach()).abs().max())
        scale = float(wanted.detach().abs().max())
        return error / scale if scale > 0 else error
    # Python's maximum would lose a NaN.
    parts = [distance(f, w) for f, w in zip(found, wanted, strict=True)]
    return float(torch.tensor(parts, dtype=torch.float64).max())


def identical(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Whether all bits agree."""
    return all(f.numpy().tobytes() == w.numpy().tobytes() for f, w in zip(found, wanted, strict=True))
