"""A field with boundary rules in one piece: what a partitioned one must look like when put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def padded(field: torch.Tensor, boundary: Sequence[str | float], width: tuple[int, int]) -> torch.Tensor:
    """`[..., ny, nx, channels]` with `width = (wy, wx)` more points on each side, by the rule of each axis, x first."""
    for axis, rule, w in ((-2, boundary[1], width[1]), (-3, boundary[0], width[0])):
        n = field.shape[axis]
        places = torch.arange(-w, n + w)
        inside = (places >= 0) & (places < n)
        if rule == "periodic":
            source = places % n
        elif rule == "reflect":
            source = (n - 1) - ((n - 1) - places.abs()).abs()
        else:
            source = places.clamp(0, n - 1)
        field = field.index_select(axis, source)
        if rule == "zero" or isinstance(rule, float):
            shape = [1] * field.dim()
            shape[axis] = n + 2 * w
            value = 0.0 if rule == "zero" else float(rule)
            field = torch.where(inside.view(shape), field, torch.full((), value, dtype=field.dtype))
    return field


def convolved(
    field: torch.Tensor,
    boundary: Sequence[str | float],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """The convolution of `[batch, ny, nx, channels]` that keeps its size."""
    width = (dilation[0] * (weight.shape[2] - 1) // 2, dilation[1] * (weight.shape[3] - 1) // 2)
    around = padded(field, boundary, width).permute(0, 3, 1, 2)
    return functional.conv2d(around, weight, bias, dilation=dilation).permute(0, 2, 3, 1)
