"""Elliptic operators as dense matrices, from their action on a whole field."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tests.oracles.fields import padded


def matrix_of(action: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The matrix of a linear map of fields, `[entry, entry]`."""
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
    return torch.stack([action(unit).reshape(-1) for unit in units], 1)


def diffusion(
    u: torch.Tensor,
    k: torch.Tensor,
    c: float,
    boundary: Sequence[str | float],
    spacing: Sequence[float],
) -> torch.Tensor:
    """-div(k grad u) + c u of fields of one shape: fluxes between neighbours, with the mean of k at their face."""
    of_k = ["periodic" if rule == "periodic" else "replicate" for rule in boundary]
    around_u, around_k = (padded(x[..., None], r, [1] * u.dim())[..., 0] for x, r in ((u, boundary), (k, of_k)))
    value = c * u
    for axis, h in enumerate(spacing):
        others = [slice(1, -1)] * u.dim()
        others[axis] = slice(None)
        line_u, line_k = around_u[tuple(others)], around_k[tuple(others)]
        flux = (line_k.narrow(axis, 1, u.shape[axis] + 1) + line_k.narrow(axis, 0, u.shape[axis] + 1)) / 2
        value = value - (flux * line_u.diff(dim=axis) / h).diff(dim=axis) / h
    return value


def solved(matrix: torch.Tensor, right: torch.Tensor, singular: bool = False) -> torch.Tensor:
    """The solution for columns `right`. If `singular`, that of mean 0 for `right` less its mean."""
    if not singular:
        return torch.linalg.solve(matrix, right)
    mean = torch.full_like(matrix, 1 / len(matrix))
    return torch.linalg.solve(matrix + mean, right - mean @ right)
