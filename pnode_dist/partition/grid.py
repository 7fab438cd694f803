"""The partition of a regular grid of one, two or three axes into rectangular blocks, with the layout of a PETSc DMDA.

A DMDA stores the channels of a point next to each other, and the points of the last axis one after another. This
rank's part of its global Vec is therefore a `[z, y, x, channel]` array, in torch's channels-last order, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise, product
from typing import Any, Literal, get_args

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.partition.dmda import Rule as Rule
from pnode_dist.partition.dmda import check_ranks, facts_of
from pnode_dist.partition.process_grid import process_grid
from pnode_dist.petsc import vectors

Boundary = Literal["periodic", "replicate", "reflect", "zero"]
BOUNDARIES: tuple[str, ...] = get_args(Boundary)
_AXES = "zyx"


class GridPartition:
    """A grid of `shape` points with `channels` values each. Collective on the state ranks.

    - `shape` is `(nx,)`, `(ny, nx)` or `(nz, ny, nx)`. All arguments for each axis have this order.
    - `boundary` is the rule beyond the edge of the domain, one for each axis or one for all: `periodic`, `replicate`
      (repeat the edge value), `reflect` (mirror the field about its last points, which are not repeated), `zero`, or a
      number (a Dirichlet value).
    - `stencil_width` is the widest halo of a single exchange. Every rank owns at least so many points along each axis.
    - `processes` are the numbers of ranks along the axes, by default those with the smallest inner surface.
    - `multiple_of` is a number, or one for each axis. Blocks have whole multiples of it, and their sizes differ by at
      most one multiple along an axis. A grid that is to be coarsened by a factor needs blocks of multiples of it.
    - `ownership` are the numbers of points that the ranks along each axis own, a sequence for each axis, by default as
      even as `multiple_of` allows. `from_dmda` takes them from a DMDA.

    Local states are `[..., nz_local, ny_local, nx_local, channels]`, or have fewer axes accordingly, with any number of
    leading batch axes. `owned` is this rank's owned range along each axis, and `position` its position in the process
    grid. `ranges` are the owned ranges of all positions along each axis, and `axes` the names of the axes. `rims`
    caches the rims of exchanges by their widths.

    Raises `ConfigurationError` for an unknown boundary or too many ranks for the grid.
    """

    def __init__(
        self,
        mesh: Mesh | MPI.Comm,
        shape: Sequence[int],
        channels: int = 1,
        boundary: Rule | Sequence[Rule] = "zero",
        stencil_width: int = 1,
        processes: Sequence[int] | None = None,
        multiple_of: int | Sequence[int] = 1,
        ownership: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.comm = protocol.communicator(mesh)
        self.shape = tuple(int(n) for n in shape)
        if not 1 <= len(self.shape) <= len(_AXES):
            raise ConfigurationError(f"grid: shape = {self.shape}: must have one, two or three axes")
        self.axes = _AXES[-len(self.shape) :]
        self.channels = channels
        self.stencil_width = stencil_width
        self.boundary = tuple(
            _checked(rule, axis)
            for rule, axis in zip(self._for_each_axis("boundary", boundary), self.axes, strict=True)
        )
        if min(*self.shape, channels) < 1 or stencil_width < 0:
            raise ConfigurationError(
                f"grid: shape = {self.shape}, channels = {channels}, stencil_width = {stencil_width}: "
                "shape and channels must be at least 1, the width at least 0"
            )
        self.multiple_of: tuple[int, ...] = self._for_each_axis("multiple_of", multiple_of)
        if any(step < 1 or n % step for n, step in zip(self.shape, self.multiple_of, strict=True)):
            raise ConfigurationError(f"grid: multiple_of = {self.multiple_of}: must divide the shape {self.shape}")
        self._ownership = ownership
        if ownership is not None:
            self.processes, lengths = self._given_lengths(ownership, processes)
        else:
            if processes is None:
                self.processes = process_grid(self.shape, self.comm.size, stencil_width, self.multiple_of)
            else:
                self.processes = self._for_each_axis("processes", tuple(processes))
            lengths = tuple(map(_even_lengths, self.shape, self.processes, self.multiple_of))
        if math.prod(self.processes) != self.comm.size or min(self.processes) < 1:
            raise ConfigurationError(f"grid: processes = {self.processes}: must multiply to {self.comm.size} ranks")
        self.ranges = tuple(list(pairwise((0, *accumulate(parts)))) for parts in lengths)
        if min(map(self.smallest_block, range(len(self.shape)))) < max(stencil_width, 1):
            raise ConfigurationError(
                f"grid: processes = {self.processes}: some rank would own fewer than {max(stencil_width, 1)} points "
                f"along an axis of {self.shape}"
            )
        self._positions = list(product(*map(range, self.processes)))
        self.position = self._positions[self.comm.rank]
        self.owned = tuple(ranges[place] for ranges, place in zip(self.ranges, self.position, strict=True))
        self.global_shape = (*self.shape, channels)
        self.local_shape = (*(stop - start for start, stop in self.owned), channels)
        self.rims: dict[Any, Any] = {}

    def _for_each_axis(self, name: str, value: Any) -> tuple[Any, ...]:
        values = (value,) * len(self.shape) if isinstance(value, str | int | float) else tuple(value)
        if len(values) != len(self.shape):
            raise ConfigurationError(
                f"grid: {name} = {value!r}: must have one entry for each of {', '.join(self.axes)}"
            )
        return values

    def _given_lengths(
        self, ownership: Sequence[Sequence[int]], processes: Sequence[int] | None
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Return the numbers of ranks along the axes, and the points that each of them owns."""
        lengths: tuple[tuple[int, ...], ...] = tuple(
            tuple(map(int, parts)) for parts in self._for_each_axis("ownership", ownership)
        )
        if processes is not None or max(self.multiple_of) > 1:
            raise ConfigurationError("grid: ownership: excludes processes and multiple_of, which follow from it")
        for axis, parts, n in zip(self.axes, lengths, self.shape, strict=True):
            if sum(parts) != n or min(parts, default=0) < 0:
                raise ConfigurationError(f"grid: ownership of {axis} = {list(parts)}: must sum to the {n} points")
        return tuple(map(len, lengths)), lengths

    @classmethod
    def from_dmda(
        cls, dmda: PETSc.DMDA, mesh: Mesh | MPI.Comm, boundary: Rule | Sequence[Rule] | None = None
    ) -> GridPartition:
        """Return the partition that follows a DMDA of PETSc: its sizes, channels (dof), ranks and owned ranges.

        Global Vecs of the DMDA and of the partition agree entry by entry, and `dm` of the partition is the DMDA. The
        stencil has the same width. Exchanges include corners, also for a star stencil. A periodic axis of the DMDA is
        `periodic`, a mirrored one `reflect`. `boundary` are the rules of all axes, by default `zero` where the DMDA has
        none (`none` and `ghosted`). Collective on the state ranks.

        Raises `ConfigurationError` for a DMDA that is not set up, has other ranks than the mesh, a twisted axis or Vecs
        on a device, and for a rule that contradicts the DMDA's.
        """
        facts = facts_of(dmda)
        comm = protocol.communicator(mesh)
        check_ranks(dmda, comm)
        rules = facts.rules if boundary is None else facts.checked(boundary)
        partition = cls(comm, facts.shape, facts.dof, rules, facts.width, ownership=facts.ownership)
        # In place of the DMDA that would be created.
        partition.__dict__["dm"] = dmda
        return partition

    @cached_property
    def dm(self) -> PETSc.DMDA:
        """The PETSc DMDA of this partition, created at the first access. Collective on the state ranks."""
        kinds = PETSc.DM.BoundaryType
        # PETSc orders the axes x, y, z.
        return PETSc.DMDA().create(
            dim=len(self.shape),
            dof=self.channels,
            sizes=self.shape[::-1],
            proc_sizes=self.processes[::-1],
            boundary_type=tuple(
                kinds.PERIODIC if rule == "periodic" else kinds.GHOSTED for rule in reversed(self.boundary)
            ),
            stencil_type=PETSc.DMDA.StencilType.BOX,
            stencil_width=self.stencil_width,
            ownership_ranges=tuple([stop - start for start, stop in ranges] for ranges in reversed(self.ranges)),
            comm=self.comm,
        )

    def owned_slices(self, rank: int) -> protocol.Slices:
        """Return the owned range of `rank` in the global `[*shape, channels]` array, one slice for each axis."""
        places = zip(self.ranges, self._positions[rank], strict=True)
        return (*(slice(*ranges[place]) for ranges, place in places), slice(0, self.channels))

    def neighbour(self, axis: int, step: int) -> int:
        """Return the neighbour along `axis`: the lower one for `step` -1, the upper one for 1.

        Returns MPI.PROC_NULL at the edge of the domain.
        """
        place = self.position[axis] + step
        if not 0 <= place < self.processes[axis]:
            if self.boundary[axis] != "periodic":
                return MPI.PROC_NULL
            place %= self.processes[axis]
        return self.comm.rank + (place - self.position[axis]) * math.prod(self.processes[axis + 1 :])

    def smallest_block(self, axis: int) -> int:
        """Return the fewest points along `axis` that any rank owns."""
        return min(stop - start for start, stop in self.ranges[axis])

    def coarsened(self, factor: int | Sequence[int], channels: int | None = None) -> GridPartition:
        """Return the grid with `factor` times fewer points along each axis. Every rank keeps its part of the domain.

        `factor` is one number, or one for each axis. The stencil has the same width, or less if the smaller blocks
        require it. Raises `ConfigurationError` if a rank's points are no whole multiple of `factor`.
        """
        factors = self._factors(factor)
        for axis, ranges, step in zip(self.axes, self.ranges, factors, strict=True):
            block = next((stop - start for start, stop in ranges if (stop - start) % step), None)
            if block is not None:
                raise ConfigurationError(
                    f"grid: a rank owns {block} points along {axis}, which cannot be coarsened by {step}: make the "
                    f"partition with multiple_of = {step} there"
                )
        narrowest = min(self.smallest_block(axis) // step for axis, step in enumerate(factors))
        return GridPartition(
            self.comm,
            [n // step for n, step in zip(self.shape, factors, strict=True)],
            self.channels if channels is None else channels,
            self.boundary,
            min(self.stencil_width, narrowest),
            None if self._ownership else self.processes,
            # If the factor does not divide the multiple, all blocks are equal.
            [m // step if m % step == 0 else 1 for m, step in zip(self.multiple_of, factors, strict=True)],
            self._ownership
            and [[part // step for part in parts] for parts, step in zip(self._ownership, factors, strict=True)],
        )

    def refined(self, factor: int | Sequence[int], channels: int | None = None) -> GridPartition:
        """Return the grid with `factor` times more points along each axis. Every rank keeps its part of the domain.

        `factor` is one number, or one for each axis. `coarsened` with the same factor is the inverse.
        """
        factors = self._factors(factor)
        return GridPartition(
            self.comm,
            [n * step for n, step in zip(self.shape, factors, strict=True)],
            self.channels if channels is None else channels,
            self.boundary,
            self.stencil_width,
            None if self._ownership else self.processes,
            1 if self._ownership else [m * step for m, step in zip(self.multiple_of, factors, strict=True)],
            self._ownership
            and [[part * step for part in parts] for parts, step in zip(self._ownership, factors, strict=True)],
        )

    def _factors(self, factor: int | Sequence[int]) -> tuple[int, ...]:
        factors = self._for_each_axis("factor", factor)
        if min(factors) < 1:
            raise ConfigurationError(f"grid: factor = {factor}: must be at least 1")
        return factors

    def create_vec(self) -> PETSc.Vec:
        """Create a zero global Vec of the DMDA. Collective on the state ranks."""
        return self.dm.createGlobalVec()

    def view(self, vec: PETSc.Vec) -> torch.Tensor:
        """Return this rank's part of `vec` as a tensor of `local_shape`, without a copy."""
        return vectors.view(vec, self.local_shape)

    def scatter(self, source: Any, root: int = 0) -> torch.Tensor:
        """Distribute a global array from `root`. Collective on the state ranks. See `protocol.scatter`."""
        return protocol.scatter(source, self, root)

    def gather(self, local: torch.Tensor, root: int = 0) -> torch.Tensor | None:
        """Return the global array on `root`, None elsewhere. Collective on the state ranks."""
        return protocol.gather(local, self, root)


def _even_lengths(points: int, ranks: int, step: int) -> tuple[int, ...]:
    """Return the points of each rank along an axis, in multiples of `step`."""
    return tuple((stop - start) * step for start, stop in protocol.even_ranges(points // step, max(ranks, 1)))


def _checked(rule: Rule, axis: str) -> Rule:
    if isinstance(rule, int | float) and not isinstance(rule, bool) and math.isfinite(rule):
        return float(rule)
    if rule not in BOUNDARIES:
        raise ConfigurationError(
            f"grid: boundary of {axis} = {rule!r}: must be one of {', '.join(BOUNDARIES)}, or a finite number"
        )
    return rule
