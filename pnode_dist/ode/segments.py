"""Segments: consecutive steps that are advanced, recorded and reversed as one.

A segment is the unit of checkpoints and tapes. No output lies inside one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from pnode_dist.ode.time_grid import TimeGrid


@dataclass(frozen=True)
class Segment:
    """Steps of size `sizes[i]` from the times `starts[i]`. The first one has the number `first`.

    `after` is the time at the end. It may differ in the last bit from that of the last step by its size.
    """

    first: int
    starts: tuple[float, ...]
    sizes: tuple[float, ...]
    after: float | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def end(self) -> float:
        """The time at the end."""
        return self.starts[-1] + self.sizes[-1] if self.after is None else self.after

    @property
    def ends(self) -> tuple[float, ...]:
        """The time at the end of each step."""
        return (*self.starts[1:], self.end)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the starts and the sizes as tensors `[steps]`, in double precision on the host."""
        return torch.tensor(self.starts, dtype=torch.float64), torch.tensor(self.sizes, dtype=torch.float64)


@dataclass(frozen=True)
class SegmentGrid:
    """The steps of `grid`, divided into segments. Segment n has the steps from `bounds[n]` to `bounds[n + 1]`."""

    grid: TimeGrid
    bounds: tuple[int, ...]

    @property
    def segments(self) -> int:
        """The number of segments."""
        return len(self.bounds) - 1

    @cached_property
    def longest(self) -> int:
        """The number of steps of the longest segment."""
        return max(last - first for first, last in pairwise(self.bounds))

    def start(self, number: int) -> float:
        """Return the time at which segment `number` begins."""
        return self.grid.starts[self.bounds[number]]

    def __getitem__(self, number: int) -> Segment:
        first, last = self.bounds[number : number + 2]
        starts = self.grid.starts
        after = starts[last] if last < self.grid.steps else self.grid.end
        return Segment(first, starts[first:last], self.grid.sizes[first:last], after)


def divided_into_segments(grid: TimeGrid, most: int, ends: Iterable[int] = ()) -> SegmentGrid:
    """Divide the steps between outputs into as few segments as possible, of at most `most` steps and similar length.

    Segments end before the steps `ends` as well, at the output times of the grid, and at jumps of f.
    """
    if most == 1:
        return SegmentGrid(grid, tuple(range(grid.steps + 1)))
    bounds = [0]
    for begin, end in pairwise(sorted({0, grid.steps, *grid.outputs, *grid.jumps, *ends})):
        pieces = -(-(end - begin) // most)
        bounds += [begin + (end - begin) * piece // pieces for piece in range(1, pieces + 1)]
    return SegmentGrid(grid, tuple(bounds))
