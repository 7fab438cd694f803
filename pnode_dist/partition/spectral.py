"""The partition of the discrete Fourier transform of a field on a grid.

The transform of an axis needs whole lines of points along it. A transform of two axes works on slabs, which are cut
along the first axis, and leaves the spectrum in slabs that are cut along the second one. One of three axes works on
slabs too, or on pencils, which are cut along two axes. The spectrum is not brought back into the layout of the grid:
operations on it act on each wave number by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.grid import GridPartition


@dataclass(frozen=True)
class Stage:
    """A local transform along `axes`, of which all ranks have whole lines.

    `before` are the blocks of its argument and `after` those of its result, which have fewer points if the transform
    keeps half of the wave numbers of the last axis (`half`).
    """

    before: GridPartition
    after: GridPartition
    axes: tuple[int, ...]
    half: bool = False


class SpectralPartition:
    """The spectrum of fields on a `GridPartition`. Collective on the state ranks.

    - `half=True` is for real fields: the last axis has the wave numbers from 0 to n // 2, as in torch.fft.rfftn.
      `half=False` is for complex fields, with all wave numbers in the order of torch.fft.fftn.
    - `grid` may have any blocks. One of the blocks of the first transform saves the first messages of each transform:
      slabs (`processes=(ranks, 1)`), or for pencils `processes=(p, q, 1)`.
    - `processes=(p, q)`, for three axes, divides p q ranks into p rows of q. The ranks of a row, and then those of a
      column, exchange pencils: lines along the last axis, then along the second, then along the first one. With q = 1
      the pencils are slabs, which are the default where the grid has enough points for them. Otherwise the default is
      the most even p and q.

    A rank's part of a spectrum is `[..., *local, channels]`, complex. Slabs have all wave numbers of all axes but the
    second, pencils all of the first axis. `owned` is this rank's range of indices along each axis, and `blocks` are
    those of all ranks. `stages` are the local transforms, in the order of the forward transform. There are none for one
    axis on several ranks, which divide the lines by their number. Transforms are periodic whatever the boundary rules
    of the grid are.

    Raises `ConfigurationError` if a rank would own no wave number, or nothing in a stage, and for `processes` of other
    grids than those of three axes or another number of ranks.
    """

    def __init__(self, grid: GridPartition, half: bool = True, processes: Sequence[int] | None = None) -> None:
        self.grid, self.half, self.comm = grid, half, grid.comm
        self.shape = (*grid.shape[:-1], grid.shape[-1] // 2 + 1) if half else grid.shape
        if processes is not None and len(grid.shape) != 3:
            raise ConfigurationError(f"spectrum: processes = {tuple(processes)}: is for grids of three axes")
        self.processes = self._default_processes() if processes is None else self._checked(tuple(processes))
        self.stages = _merged(self._new_stages())
        self.blocks = self.stages[-1].after if self.stages else self._divided(_even(self.shape[0], self.comm.size))

    def _default_processes(self) -> tuple[int, ...]:
        """Return the ranks along the first axes of the field: slabs if possible, else the most even pencils."""
        ranks, shape, axes = self.comm.size, self.shape, self.grid.axes
        if ranks <= min(shape[:2]):
            return (ranks,) if len(shape) == 1 else (ranks, 1)
        if len(shape) == 1:
            raise ConfigurationError(
                f"spectrum: shape = {self.grid.shape}: has {shape[0]} wave numbers along {axes}: must have at least "
                f"one for each of {ranks} ranks"
            )
        if len(shape) == 2:
            raise ConfigurationError(
                f"spectrum: shape = {self.grid.shape}: has {shape[0]} points along {axes[0]} and {shape[1]} wave "
                f"numbers along {axes[1]}: must have at least one of both for each of {ranks} ranks"
            )
        rows, columns = self._most_processes()
        choices = [(p, ranks // p) for p in range(1, rows + 1) if ranks % p == 0 and ranks // p <= columns]
        if not choices:
            raise ConfigurationError(
                f"spectrum: shape = {self.grid.shape}: cannot be divided into pencils for {ranks} ranks: must be p q "
                f"ranks with p <= {rows} and q <= {columns}"
            )
        return min(choices, key=lambda choice: (abs(choice[0] - choice[1]), -choice[0]))

    def _most_processes(self) -> tuple[int, int]:
        """Return the largest numbers of rows and columns of ranks for pencils."""
        first, second, last = self.shape
        return min(first, second), min(second, last)

    def _checked(self, processes: tuple[int, ...]) -> tuple[int, ...]:
        most = self._most_processes()
        if (
            len(processes) != 2
            or not all(isinstance(given, int) for given in processes)
            or math.prod(processes) != self.comm.size
            or not all(1 <= given <= limit for given, limit in zip(processes, most, strict=True))
        ):
            raise ConfigurationError(
                f"spectrum: processes = {processes}: must be two numbers that multiply to {self.comm.size} ranks, the "
                f"first at most {most[0]} and the second at most {most[1]}"
            )
        return processes

    def _new_stages(self) -> list[Stage]:
        """Return a local transform for each axis, from the last to the first. None for a line on several ranks."""
        grid, half = self.grid, self.half
        if len(grid.shape) == 1:
            return [Stage(grid, self._divided([self.shape[0]]), (0,), half)] if self.comm.size == 1 else []
        rows, columns = self.processes
        first = (rows, columns, *[1] * (len(grid.shape) - 2))
        before = grid
        if grid.processes != first:
            before = GridPartition(self.comm, grid.shape, grid.channels, stencil_width=0, processes=first)
        along_first, along_second = (_lengths(before.ranges[axis]) for axis in (0, 1))
        whole = [[n] for n in self.shape]
        seconds = _even(self.shape[1], rows)
        if len(grid.shape) == 2:
            last = self._divided(whole[0], seconds)
            return [Stage(before, self._divided(along_first, whole[1]), (1,), half), Stage(last, last, (0,))]
        thirds = _even(self.shape[2], columns)
        middle, last = self._divided(along_first, whole[1], thirds), self._divided(whole[0], seconds, thirds)
        return [
            Stage(before, self._divided(along_first, along_second, whole[2]), (2,), half),
            Stage(middle, middle, (1,)),
            Stage(last, last, (0,)),
        ]

    def _divided(self, *ownership: Sequence[int]) -> GridPartition:
        """Return blocks of the spectrum with these numbers of points along each axis."""
        return GridPartition(self.comm, self.shape, self.grid.channels, stencil_width=0, ownership=ownership)

    @property
    def owned(self) -> tuple[tuple[int, int], ...]:
        """This rank's range of indices along each axis of the spectrum."""
        return self.blocks.owned

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape `[*shape, channels]` of the whole spectrum."""
        return self.blocks.global_shape

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part of the spectrum, channels last."""
        return self.blocks.local_shape

    def owned_slices(self, rank: int) -> protocol.Slices:
        """Return the owned range of `rank` in the global `[*shape, channels]` spectrum, one slice for each axis."""
        return self.blocks.owned_slices(rank)

    def scatter(self, source: Any, root: int = 0) -> torch.Tensor:
        """Distribute a whole spectrum from `root`. Collective on the state ranks. See `protocol.scatter`."""
        return protocol.scatter(source, self, root)

    def gather(self, local: torch.Tensor, root: int = 0) -> torch.Tensor | None:
        """Return the whole spectrum on `root`, None elsewhere. Collective on the state ranks."""
        return protocol.gather(local, self, root)

    @cached_property
    def modes(self) -> tuple[torch.Tensor, ...]:
        """The signed numbers of waves along each axis of this rank's part, one float64 vector for each axis."""
        found = []
        for axis, (n, (start, stop)) in enumerate(zip(self.grid.shape, self.owned, strict=True)):
            halved = self.half and axis == len(self.shape) - 1
            whole = (torch.fft.rfftfreq if halved else torch.fft.fftfreq)(n, 1 / n, dtype=torch.float64)
            found.append(whole[start:stop].round())
        return tuple(found)

    def wavenumbers(
        self,
        lengths: float | Sequence[float] = 2 * math.pi,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return the wave numbers 2 pi m / length of this rank's part, one tensor for each axis. Not collective.

        Each tensor has the wave numbers of one axis, and length 1 along the others and the channels: all of them
        broadcast against `[..., *local, channels]`. `lengths` are the lengths of the domain, in the unit of length. The
        wave number n / 2 of an axis of even length has no sign of its own; it is given that of torch.fft, and a
        derivative of odd order should set its entries to zero, as `dealias` does. Raises `ConfigurationError` for a
        length that is not positive.
        """
        given = tuple(lengths) if isinstance(lengths, Sequence) else (lengths,) * len(self.shape)
        if len(given) != len(self.shape) or not all(0 < length < math.inf for length in given):
            each = ", ".join(self.grid.axes)
            raise ConfigurationError(
                f"wavenumbers: lengths = {lengths}: must be positive, one or one for each of {each}"
            )
        return tuple(
            self._along(axis, modes * (2 * math.pi / length)).to(dtype=dtype, device=device)
            for axis, (modes, length) in enumerate(zip(self.modes, given, strict=True))
        )

    def dealias(
        self,
        fraction: float = 2 / 3,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Return the mask `[*local, 1]` of the wave numbers to keep, 1 or 0. Not collective.

        Keeps the modes m with |m| < fraction n / 2 along all axes. The default is the two-thirds rule for products of
        two fields: S. A. Orszag, J. Atmos. Sci. 28, 1074 (1971). Raises `ConfigurationError` for a fraction that is not
        in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ConfigurationError(f"dealias: fraction = {fraction}: must be above 0 and at most 1")
        mask = torch.ones(*self.local_shape[:-1], 1, dtype=dtype)
        for axis, (modes, n) in enumerate(zip(self.modes, self.grid.shape, strict=True)):
            mask = mask * self._along(axis, 2 * modes.abs() < fraction * n)
        return mask.to(device=device)

    def exponential_filter(
        self,
        order: float = 36,
        strength: float = 36.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Return the factors exp(-strength (2 |m| / n)^order) of all axes multiplied, `[*local, 1]`. Not collective.

        The defaults are those of T. Y. Hou and R. Li, J. Comput. Phys. 226, 379 (2007), which damp the upper third as
        the two-thirds rule does, but smoothly. Raises `ConfigurationError` unless `order` is above 0
        and `strength` at least 0.
        """
        if not (order > 0 and strength >= 0):
            raise ConfigurationError(
                f"exponential_filter: order = {order}, strength = {strength}: must be above 0, and at least 0"
            )
        exponent = torch.zeros(*self.local_shape[:-1], 1, dtype=torch.float64)
        for axis, (modes, n) in enumerate(zip(self.modes, self.grid.shape, strict=True)):
            exponent = exponent - strength * self._along(axis, (2 * modes.abs() / n) ** order)
        return exponent.exp().to(dtype=dtype, device=device)

    def _along(self, axis: int, values: torch.Tensor) -> torch.Tensor:
        """Return a vector along one axis, with length 1 along the others and the channels."""
        shape = [1] * (len(self.shape) + 1)
        shape[axis] = len(values)
        return values.view(shape)


def _merged(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Join stages between which no values move: torch transforms several axes faster together."""
    found: list[Stage] = []
    for stage in stages:
        if found and found[-1].after.ranges == stage.before.ranges:
            former = found.pop()
            stage = Stage(former.before, stage.after, (*stage.axes, *former.axes), former.half)
        found.append(stage)
    return tuple(found)


def _lengths(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in ranges]


def _even(length: int, parts: int) -> list[int]:
    return _lengths(protocol.even_ranges(length, parts))
