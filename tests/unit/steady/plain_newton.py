"""Steady states in plain torch: Newton's method on dense Jacobians, and gradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Field = Callable[[torch.Tensor], torch.Tensor]


def dense_jacobian(f: Field, u: torch.Tensor) -> torch.Tensor:
    """df/du `[n, n]` at `u` `[n]`."""
    return torch.func.jacrev(f)(u.detach())


def plain_newton(f: Field, u0: torch.Tensor) -> torch.Tensor:
    """The steady state that full Newton steps from `u0` `[n]` lead to."""
    u = u0.detach().clone()
    for _ in range(100):
        step = torch.linalg.solve(dense_jacobian(f, u), f(u)).detach()
        u = u - step
        if float(step.norm()) < 1e-14 * max(1.0, float(u.norm())):
            return u
    raise AssertionError("Newton's method did not converge")


def implicit_gradient(
    f: Field, u: torch.Tensor, cotangent: torch.Tensor, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradient of <u, cotangent> at a steady state `u`: -(df/dtheta)^T (df/du)^-T cotangent."""
    weights = torch.linalg.solve(dense_jacobian(f, u).T, cotangent)
    return [-found for found in torch.autograd.grad(f(u.detach()), parameters, weights)]
