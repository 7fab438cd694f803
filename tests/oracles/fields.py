"""A field with boundary rules in one piece: what a partitioned one must look like when put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def padded(field: torch.Tensor, boundary: Sequence[str], width: tuple[int, int]) -> torch.Tensor:
    """`[..., ny, nx, channels]` with `width = (wy, wx)` more points on each side, by the rule of each axis."""
    for axis, rule, w in zip((-3, -2), boundary, width, strict=True):
        n = field.shape[axis]
        places = torch.arange(-w, n + w)
        inside = (places >= 0) & (places < n)
        source = places % n if rule == "periodic" else places.clamp(0, n - 1)
        field = field.index_select(axis, source)
        if rule == "zero":
            shape = [1] * field.dim()
            shape[axis] = n + 2 * w
            field = torch.where(inside.view(shape), field, torch.zeros((), dtype=field.dtype))
    return field


def convolved(
    field: torch.Tensor,
    boundary: Sequence[str],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """The convolution of `[batch, ny, nx, channels]` that keeps its size."""
    width = (dilation[0] * (weight.shape[2] - 1) // 2, dilation[1] * (weight.shape[3] - 1) // 2)
    around = padded(field, boundary, width).permute(0, 3, 1, 2)
    return functional.conv2d(around, weight, bias, dilation=dilation).permute(0, 2, 3, 1)
