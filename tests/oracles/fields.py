"""A field with boundary rules in one piece: what a partitioned one must look like when put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def padded(
    field: torch.Tensor, boundary: Sequence[str | float], width: Sequence[int | tuple[int, int]]
) -> torch.Tensor:
    """`[..., *shape, channels]` with more points along each axis by its rule, the last axis first.

    As many on each side as `width` says, or below and above as its pairs do.
    """
    axes = len(boundary)
    for number in reversed(range(axes)):
        axis, rule, w = number - axes - 1, boundary[number], width[number]
        n = field.shape[axis]
        lower, upper = (w, w) if isinstance(w, int) else w
        places = torch.arange(-lower, n + upper)
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
            shape[axis] = len(places)
            value = 0.0 if rule == "zero" else float(rule)
            field = torch.where(inside.view(shape), field, torch.full((), value, dtype=field.dtype))
    return field


def convolved(
    field: torch.Tensor,
    boundary: Sequence[str | float],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> torch.Tensor:
    """The convolution of `[batch, *shape, channels]` that keeps its size."""
    steps = (1,) * len(boundary) if dilation is None else tuple(dilation)
    width = [step * (k - 1) // 2 for step, k in zip(steps, weight.shape[2:], strict=True)]
    convolution = (functional.conv1d, functional.conv2d, functional.conv3d)[len(boundary) - 1]
    around = padded(field, boundary, width).movedim(-1, 1).contiguous()
    return convolution(around, weight, bias, dilation=steps, groups=groups).movedim(1, -1)
