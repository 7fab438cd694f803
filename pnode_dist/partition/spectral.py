"""The partition of the discrete Fourier transform of a field on a grid.

The transform needs whole lines of points along each axis. It works on slabs, which are cut along the first axis, and
leaves the spectrum in slabs that are cut along the second axis. The spectrum is not brought back into the layout of the
grid: operations on it act on each wave number by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.grid import GridPartition


class SpectralPartition:
    """The spectrum of fields on a `GridPartition` of two or three axes. Collective on the state ranks.

    - `half=True` is for real fields: the last axis has the wave numbers from 0 to n // 2, as in torch.fft.rfftn.
      `half=False` is for complex fields, with all wave numbers in the order of torch.fft.fftn.
    - `grid` may have any blocks. One of slabs along the first axis (`processes=(ranks, 1)`) saves one message to each
      rank in each transform.

    A rank's part of a spectrum is `[..., *local, channels]`, complex, with all wave numbers of the first axis, and of
    the last one if there are three. `owned` is this rank's range of indices along each axis. `slabs` are the blocks of
    the field, `slab_spectrum` those between the two local transforms, and `blocks` those of the spectrum. Transforms
    are periodic whatever the boundary rules of the grid are.

    Raises `ConfigurationError` for a grid of one axis, and for fewer points along the first axis, or wave numbers along
    the second, than ranks.
    """

    def __init__(self, grid: GridPartition, half: bool = True) -> None:
        axes, ranks = len(grid.shape), grid.comm.size
        if axes < 2:
            raise ConfigurationError(
                f"spectrum: shape = {grid.shape}: must have two or three axes; torch.fft transforms a line on one rank"
            )
        self.grid, self.half, self.comm = grid, half, grid.comm
        self.shape = (*grid.shape[:-1], grid.shape[-1] // 2 + 1) if half else grid.shape
        if self.shape[0] < ranks or self.shape[1] < ranks:
            raise ConfigurationError(
                f"spectrum: shape = {grid.shape}: has {self.shape[0]} points along {grid.axes[0]} and {self.shape[1]} "
                f"wave numbers along {grid.axes[1]}: must have at least one of both for each of {ranks} ranks"
            )
        first = (ranks, *[1] * (axes - 1))
        second = (1, ranks, *[1] * (axes - 2))
        self.slabs = grid
        if grid.processes != first:
            self.slabs = GridPartition(self.comm, grid.shape, grid.channels, stencil_width=0, processes=first)
        rows = [stop - start for start, stop in self.slabs.ranges[0]]
        self.slab_spectrum = GridPartition(
            self.comm, self.shape, grid.channels, stencil_width=0, ownership=[rows, *[[n] for n in self.shape[1:]]]
        )
        self.blocks = GridPartition(self.comm, self.shape, grid.channels, stencil_width=0, processes=second)

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
