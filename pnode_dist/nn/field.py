"""Blocks of a field as inputs of layers: checks against the partition, and axes in torch's order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition


def require_axes(layer: str, partition: GridPartition, axes: int) -> None:
    """Raise `ConfigurationError` unless the grid has as many axes as the layer of this name is for. Not collective."""
    if len(partition.shape) != axes:
        raise ConfigurationError(
            f"{layer}: is for grids of {axes} {'axis' if axes == 1 else 'axes'}, and this one has "
            f"{', '.join(partition.axes)}"
        )


def for_each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Return one number for each axis, from such a sequence or from one number for all."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def require_block(layer: str, x: torch.Tensor, partition: GridPartition) -> None:
    """Raise `ValueError` unless `x` is this rank's block `[..., *local, channels]`. Not collective."""
    own = partition.local_shape[:-1]
    if x.dim() <= len(own) or tuple(x.shape[-1 - len(own) : -1]) != own:
        raise ValueError(
            f"{layer}: got shape {tuple(x.shape)}, this rank owns [..., {', '.join(map(str, own))}, channels]"
        )


def channels_first(x: torch.Tensor, axes: int) -> torch.Tensor:
    """Return `[..., *block, channels]` as `[sample, channel, *block]`, a line as `[sample, channel, 1, point]`.

    Moving the channels' axis changes only the strides: the memory has torch's channels_last format already, for two or
    three axes. A line becomes a plane, because torch's operations on a line would copy it first.
    """
    samples = x.reshape(-1, *x.shape[-1 - axes :])
    return (samples.unsqueeze(1) if axes == 1 else samples).movedim(-1, 1)


def channels_last(y: torch.Tensor, like: torch.Tensor, axes: int) -> torch.Tensor:
    """Apply the inverse of `channels_first`, with the leading axes of `like`."""
    samples = y.movedim(1, -1)
    if axes == 1:
        samples = samples.squeeze(1)
    return samples.reshape(*like.shape[: -1 - axes], *samples.shape[1:])
