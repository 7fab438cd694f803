"""The solution of -div(k grad u) + c u = b on a partitioned grid, by PETSc."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import halo
from pnode_dist.nn.field import require_block
from pnode_dist.nn.ksp_solve import KSPSolve
from pnode_dist.partition.dmda import Rule
from pnode_dist.partition.grid import GridPartition
from pnode_dist.petsc import calls

_OUTSIDE = -1.0
"""The index of a point beyond the domain, which PETSc skips."""


class Poisson(nn.Module):
    """The solution u of -div(k grad u) + c u = b on a partitioned, channels-last field, in second order.

    `[..., *local, channels]` -> the same shape. Creating it is collective on the partition. `k` and `c` are numbers, or
    fields `[*local]` of this rank that are the same for all channels. With `k=None`, each call takes a field k, and is
    differentiable with respect to it. `spacing` is the distance of points, one number or one for each axis. The matrix
    is assembled, and solved by CG with GAMG unless PETSc's `options` say otherwise (see `KSPSolve`). k at the face of
    two points is the mean of theirs.

    The partition's boundary rules are those of u: `periodic`; `zero` or a number, the value of u at one spacing
    beyond the last point; `replicate`, no flux through the face half a spacing beyond the last point. Without a
    Dirichlet value and with c = 0, only the solution of mean 0 is determined, for b less its mean.
    Raises `ConfigurationError` for `reflect`, and on all ranks unless k is positive and c at least 0.
    """

    def __init__(
        self,
        partition: GridPartition,
        *,
        spacing: float | Sequence[float] = 1.0,
        k: float | torch.Tensor | None = 1.0,
        c: float | torch.Tensor = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for axis, rule in zip(partition.axes, partition.boundary, strict=True):
            if rule == "reflect":
                raise ConfigurationError(
                    f"Poisson: boundary of {axis} = 'reflect': must be periodic, replicate, zero, or a number, for "
                    "which the matrix is symmetric"
                )
        self.partition = partition
        self.takes_k = k is None
        for name, given in (("k", k), ("c", c)):
            if isinstance(given, torch.Tensor) and given.requires_grad:
                raise ConfigurationError(
                    f"Poisson: {name}: requires a gradient: k has one if it is given at each call, with k=None; "
                    "KSPSolve takes other coefficients, as parameters of a function"
                )
        reaction = _field(partition, "c", c)
        _check_range(partition, "c", reaction, 0.0, "at least 0")
        reacts = partition.comm.allreduce(bool((reaction > 0).any()), MPI.LOR)
        self._stencil = _stencil(partition, _spacings(partition, spacing), reaction)
        columns = self._stencil.columns()
        self._matrix = _preallocated(self._stencil.of_u, columns)
        self._filled: torch.Tensor | None = None
        # With k=None, each call fills the matrix again.
        fixed = _field(partition, "k", 1.0 if k is None else k)
        self._fill(fixed)
        self._lift = self._stencil.lift(fixed)
        singular = not reacts and all(rule in ("periodic", "replicate") for rule in partition.boundary)
        self.solve = KSPSolve(
            self._stencil.apply if k is None else self._matrix,
            self._stencil.of_u,
            symmetric=True,
            nullspace="constant" if singular else None,
            preconditioner=self._matrix if k is None else None,
            options=options,
        )

    def forward(self, b: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
        """Solve for b, with the k of this call if the layer takes one. Collective on the partition, as backward is.

        Raises `ConvergenceError` on all ranks if the solve does not converge.
        """
        require_block("Poisson", b, self.partition)
        if self.takes_k != (k is not None):
            raise ConfigurationError(
                f"Poisson: k: must {'be given at each call' if self.takes_k else 'be given once'}: "
                f"the layer was made {'with' if self.takes_k else 'without'} k=None"
            )
        if k is not None:
            k = _field(self.partition, "k", k)
            self._fill(k.detach())
        lift = self._lift if k is None else self._stencil.lift(k)
        right = b.movedim(-1, 0) + lift.to(b.device, b.dtype)
        parameters = () if k is None else (k.to(b.device, b.dtype),)
        u: torch.Tensor = self.solve(right.unsqueeze(-1), *parameters)
        return u.squeeze(-1).movedim(0, -1)

    def _fill(self, k: torch.Tensor) -> None:
        """Compute the entries of the matrix, unless no rank's k has changed. Collective."""
        k = k.to("cpu", torch.float64)
        same = self._filled is not None and torch.equal(k, self._filled)
        if self.partition.comm.allreduce(same, MPI.LAND):
            return
        _check_range(self.partition, "k", k, math.ulp(0.0), "positive")
        calls.set_coordinate_values(self._matrix, self._stencil.entries(k).numpy().reshape(-1))
        self._filled = k.clone()

    def extra_repr(self) -> str:
        """Return the grid for `repr`."""
        return f"shape={self.partition.shape}, boundary={self.partition.boundary}"


@dataclass(frozen=True)
class _Stencil:
    """The operator u -> -div(k grad u) + c u on one channel, with zero in place of the Dirichlet values.

    `of_u`, `of_k` and `of_indices` are the grid with the boundary rules of these fields.
    """

    partition: GridPartition
    of_u: GridPartition
    of_k: GridPartition
    of_indices: GridPartition
    spacings: tuple[float, ...]
    c: torch.Tensor

    def apply(self, u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return the operator's value `[*local, 1]`. Collective."""
        inner = u[..., 0]
        flux = self.c.to(u) * inner
        for face, beyond in zip(self.faces(k), _neighbours(u, self.of_u), strict=True):
            flux = flux + face * (inner - beyond)
        return flux.unsqueeze(-1)

    def faces(self, k: torch.Tensor) -> list[torch.Tensor]:
        """Return k / spacing^2 at the faces below and above each point, for each axis in turn. Collective."""
        found = []
        for number, beyond in enumerate(_neighbours(k.unsqueeze(-1), self.of_k)):
            axis, side = divmod(number, 2)
            face = (k + beyond) / (2 * self.spacings[axis] ** 2)
            if self.partition.boundary[axis] == "replicate":
                face = face * ~self._edge(axis, side).to(k.device)
            found.append(face)
        return found

    def lift(self, k: torch.Tensor) -> torch.Tensor:
        """Return the part of the right-hand side that Dirichlet values make, `[*local]`. Collective."""
        lift = torch.zeros_like(k)
        if not any(isinstance(rule, float) for rule in self.partition.boundary):
            return lift
        for number, face in enumerate(self.faces(k)):
            axis, side = divmod(number, 2)
            rule = self.partition.boundary[axis]
            if isinstance(rule, float):
                lift = lift + rule * face * self._edge(axis, side).to(k.device)
        return lift

    def columns(self) -> torch.Tensor:
        """Return the indices of each point and its neighbours, `[entry, *local]`. Collective."""
        comm, shape = self.partition.comm, self.partition.local_shape[:-1]
        size = math.prod(shape)
        start = sum(comm.allgather(size)[: comm.rank])
        own = torch.arange(start, start + size, dtype=torch.float64).view(shape)
        return torch.stack([own, *_neighbours(own.unsqueeze(-1), self.of_indices)])

    def entries(self, k: torch.Tensor) -> torch.Tensor:
        """Return the entries of the matrix in the order of `columns`. Collective."""
        faces = torch.stack(self.faces(k))
        return torch.cat([(self.c + faces.sum(0)).unsqueeze(0), -faces])

    def _edge(self, axis: int, side: int) -> torch.Tensor:
        """Return True for points at the lower (`side` 0) or upper edge of the domain, `[*local]`."""
        start, stop = self.partition.owned[axis]
        places = torch.arange(start, stop) == (self.partition.shape[axis] - 1 if side else 0)
        shape = [1] * len(self.partition.shape)
        shape[axis] = -1
        return places.view(shape).expand(self.partition.local_shape[:-1])


def _stencil(partition: GridPartition, spacings: tuple[float, ...], c: torch.Tensor) -> _Stencil:
    def with_rule(otherwise: Rule) -> GridPartition:
        rules = ["periodic" if rule == "periodic" else otherwise for rule in partition.boundary]
        ownership = [[stop - start for start, stop in along] for along in partition.ranges]
        return GridPartition(partition.comm, partition.shape, 1, rules, 1, ownership=ownership)

    return _Stencil(partition, with_rule("zero"), with_rule("replicate"), with_rule(_OUTSIDE), spacings, c)


def _neighbours(field: torch.Tensor, partition: GridPartition) -> list[torch.Tensor]:
    """Return the values of a field `[*local, 1]` at the points below and above, for each axis in turn. Collective."""
    around = halo(field, partition, 1)[..., 0]
    found = []
    for axis in range(around.dim()):
        for start in (0, 2):
            part = around
            for other in range(around.dim()):
                part = part.narrow(other, start if other == axis else 1, around.shape[other] - 2)
            found.append(part)
    return found


def _preallocated(partition: GridPartition, columns: torch.Tensor) -> PETSc.Mat:
    """Return a Mat with entries at `columns` `[entry, *local]` of each row. Collective."""
    size = columns[0].numel()
    matrix = PETSc.Mat().create(comm=partition.comm)
    matrix.setSizes(((size, None), (size, None)))
    matrix.setType(PETSc.Mat.Type.AIJ)
    places = columns.numpy().reshape(len(columns), size).astype(PETSc.IntType)
    calls.preallocate_coordinates(matrix, np.broadcast_to(places[0], places.shape).reshape(-1), places.reshape(-1))
    return matrix


def _spacings(partition: GridPartition, given: Any) -> tuple[float, ...]:
    axes = len(partition.shape)
    spacings = (float(given),) * axes if isinstance(given, int | float) else tuple(map(float, given))
    if len(spacings) != axes or not all(0 < each < math.inf for each in spacings):
        raise ConfigurationError(
            f"Poisson: spacing = {given!r}: must be a positive number, or one for each of {', '.join(partition.axes)}"
        )
    return spacings


def _field(partition: GridPartition, name: str, given: Any) -> torch.Tensor:
    """Return a coefficient as a field `[*local]`, of its own type if it is a tensor."""
    own = partition.local_shape[:-1]
    if isinstance(given, torch.Tensor) and given.dim() > 0:
        if tuple(given.shape) != own or not given.is_floating_point():
            raise ConfigurationError(
                f"Poisson: {name}: has {given.dtype} {tuple(given.shape)}: must be a number, or a field of this rank's "
                f"{own}"
            )
        return given
    if not isinstance(given, int | float | torch.Tensor) or isinstance(given, bool):
        raise ConfigurationError(f"Poisson: {name} = {given!r}: must be a number, or a field of this rank's {own}")
    return torch.as_tensor(given, dtype=torch.float64).expand(own)


def _check_range(partition: GridPartition, name: str, values: torch.Tensor, least: float, words: str) -> None:
    """Raise `ConfigurationError` on all ranks unless all values are finite and at least `least`. Collective."""
    right = bool(torch.isfinite(values).all() and (values >= least).all())
    if not partition.comm.allreduce(right, MPI.LAND):
        raise ConfigurationError(f"Poisson: {name}: must be finite and {words} at every point")
