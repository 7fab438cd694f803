"""Dense matrices of stencil operators, written down entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch


def stencil_matrix(
    shape: Sequence[int],
    channels: int,
    samples: int,
    width: int | Sequence[int],
    boundary: Sequence[str],
    seed: int,
) -> torch.Tensor:
    """A matrix on fields `[samples, *shape, channels]` with random numbers wherever a stencil of `width` reaches.

    Between all channels of two points of the same sample, and zero elsewhere.
    """
    reach = (width,) * len(shape) if isinstance(width, int) else tuple(width)
    near = torch.zeros(*shape, *shape, dtype=torch.float64)
    for point in product(*map(range, shape)):
        for step in product(*(range(-w, w + 1) for w in reach)):
            other = [
                (at + by) % n if rule == "periodic" else at + by
                for at, by, n, rule in zip(point, step, shape, boundary, strict=True)
            ]
            if all(0 <= at < n for at, n in zip(other, shape, strict=True)):
                near[(*point, *other)] = 1
    number = math.prod(shape)
    points = torch.kron(near.view(number, number), torch.ones(channels, channels, dtype=torch.float64))
    pattern = torch.block_diag(*[points] * samples)
    # Away from zero, so that nothing that belongs to the pattern could pass for nothing.
    numbers = 0.5 + torch.rand(pattern.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pattern * numbers
