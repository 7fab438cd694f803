"""What the ranks have of a field on a grid that every rank knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode_dist import GridPartition


def block(
    partition: GridPartition,
    whole: torch.Tensor,
    width: Sequence[int | tuple[int, int]] | None = None,
    rank: int | None = None,
) -> torch.Tensor:
    """A rank's part, by default this one's, of a whole field, or of a padded one with `width` points around its own."""
    owned = partition.owned_slices(partition.comm.rank if rank is None else rank)[:-1]
    sides = [(w, w) if isinstance(w, int) else w for w in ([0] * len(owned) if width is None else width)]
    wider = (slice(own.start, own.stop + sum(pair)) for own, pair in zip(owned, sides, strict=True))
    return whole[(..., *wider, slice(None))]


def blocks(
    partition: GridPartition, whole: torch.Tensor, width: Sequence[int | tuple[int, int]] | None = None
) -> list[torch.Tensor]:
    """The parts of all ranks."""
    return [block(partition, whole, width, rank) for rank in range(partition.comm.size)]
