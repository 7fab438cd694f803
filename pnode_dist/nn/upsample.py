"""Interpolation from a partitioned grid to a finer one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import halo
from pnode_dist.nn.field import for_each_axis, require_block
from pnode_dist.partition.grid import GridPartition

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""torch's names of linear interpolation, by the number of axes."""


class Upsample(nn.Module):
    """torch.nn.Upsample by a whole `scale_factor`, one or one for each axis, on a partitioned, channels-last field.

    `[..., *local, channels]` -> `[..., *fine local, channels]`, this rank's block of the grid `output`, which is the
    partition refined by the factor. `mode` is `nearest`, which communicates nothing, or for one, two and three axes
    `linear`, `bilinear` and `trilinear`, with values in the middle of cells (torch's `align_corners=False`): these
    exchange a halo of one point, and go by the partition's boundary rules beyond the edges of the domain. torch knows
    one of them, `replicate`. The result has the same bits on any number of ranks.
    `forward` is collective on the partition's communicator unless the mode is `nearest`, and so is its backward.
    Raises `ConfigurationError` for another mode or factor.
    """

    def __init__(self, partition: GridPartition, scale_factor: int | Sequence[int], mode: str = "nearest") -> None:
        super().__init__()
        linear = LINEAR[len(partition.shape)]
        if mode not in ("nearest", linear):
            raise ConfigurationError(f"Upsample: mode = {mode!r}: must be 'nearest' or '{linear}'")
        self.partition = partition
        self.scale_factor = for_each_axis(scale_factor, len(partition.shape))
        self.mode = mode
        self.output = partition.refined(self.scale_factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Interpolate. Collective on the partition's communicator unless the mode is `nearest`."""
        require_block("Upsample", x, self.partition)
        first = x.dim() - 1 - len(self.scale_factor)
        if self.mode == "nearest":
            for axis, factor in enumerate(self.scale_factor, first):
                x = x.repeat_interleave(factor, axis) if factor > 1 else x
            return x
        x = halo(x, self.partition, tuple(int(factor > 1) for factor in self.scale_factor))
        for axis, factor in enumerate(self.scale_factor, first):
            x = _interpolated(x, axis, factor) if factor > 1 else x
        return x

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"scale_factor={self.scale_factor}, mode={self.mode!r}"


def _interpolated(x: torch.Tensor, axis: int, factor: int) -> torch.Tensor:
    """Interpolate linearly along an axis with a halo of one point, which is removed."""
    below, here, above = (x.narrow(axis, start, x.shape[axis] - 2) for start in (0, 1, 2))
    phases = []
    for phase in range(factor):
        # The middle of the fine cell, relative to the middle of its coarse cell.
        offset = (phase + 0.5) / factor - 0.5
        phases.append(torch.lerp(here, below if offset < 0 else above, abs(offset)))
    return torch.stack(phases, axis + 1).flatten(axis, axis + 1)
