"""Dense matrices of stencil operators, written down entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch


def stencil_matrix(
    shape: tuple[int, int],
    channels: int,
    samples: int,
    width: int | tuple[int, int],
    boundary: Sequence[str],
    seed: int,
) -> torch.Tensor:
    """A matrix on fields `[samples, ny, nx, channels]` with random numbers wherever a stencil of `width` reaches.

    Between all channels of two points of the same sample, and zero elsewhere.
    """
    wy, wx = (width, width) if isinstance(width, int) else width
    ny, nx = shape
    near = torch.zeros(ny, nx, ny, nx, dtype=torch.float64)
    for y, x, dy, dx in product(range(ny), range(nx), range(-wy, wy + 1), range(-wx, wx + 1)):
        other_y = (y + dy) % ny if boundary[0] == "periodic" else y + dy
        other_x = (x + dx) % nx if boundary[1] == "periodic" else x + dx
        if 0 <= other_y < ny and 0 <= other_x < nx:
            near[y, x, other_y, other_x] = 1
    points = torch.kron(near.view(ny * nx, ny * nx), torch.ones(channels, channels, dtype=torch.float64))
    pattern = torch.block_diag(*[points] * samples)
    # Away from zero, so that nothing that belongs to the pattern could pass for nothing.
    numbers = 0.5 + torch.rand(pattern.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pattern * numbers
