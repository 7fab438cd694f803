"""Rectangular blocks of a regular grid, laid out by a PETSc DMDA.

A DMDA stores a point's channels next to each other and rows one after another, so this rank's part of its global Vec
is a `[y, x, channel]` array: torch's channels-last order, viewed without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.mesh import Mesh
from pnode_dist.partition import protocol

Boundary = Literal["periodic", "replicate", "reflect", "zero"]
BOUNDARIES: tuple[str, ...] = get_args(Boundary)
Rule = str | float
"""A boundary's name, or the value that is fixed beyond it."""


def process_grid(shape: tuple[int, int], size: int, width: int) -> tuple[int, int]:
    """The `(rows, columns)` of ranks whose blocks have the shortest inner edges, each at least `width` wide.

    Raises `ConfigurationError` when the grid is too small for `size` ranks.
    """
    least = max(width, 1)
    choices = [(rows, size // rows) for rows in range(1, size + 1) if size % rows == 0]
    fitting = [grid for grid in choices if all(n // p >= least for n, p in zip(shape, grid, strict=True))]
    if not fitting:
        most = (shape[0] // least) * (shape[1] // least)
        raise ConfigurationError(
            f"a grid of {shape[0]} x {shape[1]} points cannot be split over {size} rank(s) with {least} or more rows "
            "and columns each (the width of the halo): "
            + (f"use at most {most}, or fewer" if most else "it needs a larger grid or a narrower halo")
        )
    return min(fitting, key=lambda grid: ((grid[0] - 1) * shape[1] + (grid[1] - 1) * shape[0], grid[1]))


class GridPartition:
    """A 2-D grid of `shape = (ny, nx)` points with `channels` values each. Collective on the state ranks.

    `boundary` is the rule beyond the edge of the domain, for y and for x: `periodic`, `replicate` (the edge value
    goes on), `reflect` (the field is mirrored about its last points, which are not repeated), `zero`, or a number (a
    Dirichlet value). `stencil_width` is the widest halo a single exchange will need; every rank owns at least so
    many rows and columns. `processes = (py, px)` fixes the process grid, else the one with the shortest inner edges
    is taken. Blocks may differ by one row or column.

    Local states are `[..., ny_local, nx_local, channels]` with any number of leading batch axes. `owned` is this
    rank's `((y0, y1), (x0, x1))`; `dm` is the PETSc DMDA behind it; `beyond` keeps what exchanges of a width and type
    put beyond the edges where values are fixed.
    Raises `ConfigurationError` for an unknown boundary or too many ranks for the grid.
    """

    def __init__(
        self,
        mesh: Mesh | MPI.Comm,
        shape: tuple[int, int],
        channels: int = 1,
        boundary: Sequence[Rule] = ("zero", "zero"),
        stencil_width: int = 1,
        processes: tuple[int, int] | None = None,
    ) -> None:
        self.comm = protocol.communicator(mesh)
        self.shape = (int(shape[0]), int(shape[1]))
        self.channels = channels
        self.stencil_width = stencil_width
        self.boundary = (_checked(boundary[0], "y"), _checked(boundary[1], "x"))
        if min(*self.shape, channels) < 1 or stencil_width < 0:
            raise ConfigurationError(
                f"grid: shape = {self.shape}, channels = {channels}, stencil_width = {stencil_width}: "
                "shape and channels must be at least 1, the width at least 0"
            )
        self.processes = processes or process_grid(self.shape, self.comm.size, stencil_width)
        if self.processes[0] * self.processes[1] != self.comm.size:
            raise ConfigurationError(f"grid: processes = {self.processes}: must multiply to {self.comm.size} ranks")
        rows, columns = (protocol.even_ranges(n, p) for n, p in zip(self.shape, self.processes, strict=True))
        if min(stop - start for start, stop in (*rows, *columns)) < max(stencil_width, 1):
            raise ConfigurationError(
                f"grid: processes = {self.processes}: some rank would own fewer than {max(stencil_width, 1)} rows or "
                f"columns of {self.shape}"
            )
        self._rows, self._columns = rows, columns
        self.dm = PETSc.DMDA().create(
            dim=2,
            dof=channels,
            sizes=(self.shape[1], self.shape[0]),
            proc_sizes=(self.processes[1], self.processes[0]),
            boundary_type=tuple(
                PETSc.DM.BoundaryType.PERIODIC if rule == "periodic" else PETSc.DM.BoundaryType.GHOSTED
                for rule in (self.boundary[1], self.boundary[0])
            ),
            stencil_type=PETSc.DMDA.StencilType.BOX,
            stencil_width=stencil_width,
            ownership_ranges=(
                [stop - start for start, stop in columns],
                [stop - start for start, stop in rows],
            ),
            comm=self.comm,
        )
        self.beyond: dict[tuple[tuple[int, int], torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self.position = divmod(self.comm.rank, self.processes[1])
        self.owned = (rows[self.position[0]], columns[self.position[1]])
        self.global_shape = (*self.shape, channels)
        self.local_shape = (self.owned[0][1] - self.owned[0][0], self.owned[1][1] - self.owned[1][0], channels)

    def owned_slices(self, rank: int) -> protocol.Slices:
        """The part of the global `[ny, nx, channels]` array that `rank` owns, one slice an axis."""
        row, column = divmod(rank, self.processes[1])
        return (slice(*self._rows[row]), slice(*self._columns[column]), slice(0, self.channels))

    def neighbour(self, axis: int, step: int) -> int:
        """The rank next to this one along `axis` (0: y, 1: x), lower for `step` -1 and upper for 1.

        MPI.PROC_NULL beyond the edge of the domain.
        """
        position = list(self.position)
        position[axis] += step
        if not 0 <= position[axis] < self.processes[axis]:
            if self.boundary[axis] != "periodic":
                return MPI.PROC_NULL
            position[axis] %= self.processes[axis]
        return position[0] * self.processes[1] + position[1]

    def smallest_block(self, axis: int) -> int:
        """The fewest rows (axis 0) or columns (axis 1) that any rank owns."""
        return self.shape[axis] // self.processes[axis]

    def create_vec(self) -> PETSc.Vec:
        """A zero global Vec of the DMDA. Collective on the state ranks."""
        return self.dm.createGlobalVec()

    def view(self, vec: PETSc.Vec) -> torch.Tensor:
        """This rank's part of `vec` as a tensor of `local_shape`, sharing memory."""
        return protocol.view(vec, self.local_shape)

    def scatter(self, source: Any, root: int = 0) -> torch.Tensor:
        """This rank's block of a global array held by `root`. Collective on the state ranks."""
        return protocol.scatter(source, self, root)

    def gather(self, local: torch.Tensor, root: int = 0) -> torch.Tensor | None:
        """The global array on `root`, None elsewhere. Collective on the state ranks."""
        return protocol.gather(local, self, root)


def _checked(rule: Rule, axis: str) -> Rule:
    if isinstance(rule, int | float) and not isinstance(rule, bool) and math.isfinite(rule):
        return float(rule)
    if rule not in BOUNDARIES:
        raise ConfigurationError(
            f"grid: boundary of {axis} = {rule!r}: must be one of {', '.join(BOUNDARIES)}, or a finite number"
        )
    return rule
