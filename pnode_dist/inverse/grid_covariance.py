"""A covariance with a correlation length on a partitioned grid, by solves with PETSc."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import halo
from pnode_dist.inverse.covariance import Covariance, matern_scale
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.stencil_jacobian import StencilJacobian
from pnode_dist.petsc import vectors
from pnode_dist.petsc.objects import PetscObjects

_RTOL = 1e-13
_MOST_ITERATIONS = 10000


class GridCovariance(Covariance):
    """The covariance of a field with standard deviation `deviation` and correlation `length` on a grid.

    Its root is L = s (1 - length^2 laplacian)^-1 for each channel, with s so that the variance is `deviation` squared
    far from boundaries on a grid that resolves the length. This is a Matern covariance; in two dimensions its
    smoothness is 1. `length` and `spacing` have one unit; `spacing` is one number or one for each axis. `deviation` is
    one number or one for each channel. Axes that are not periodic have a zero derivative at their ends.

    Vectors are `[..., *local_shape]`. Linear systems are solved by PETSc's conjugate gradients to a relative residual
    of 1e-13. Every call is collective on the partition's communicator.
    F. Lindgren, H. Rue, J. Lindstrom: An explicit link between Gaussian fields and Gaussian Markov random fields, J. R.
    Stat. Soc. B 73 (2011).

    Raises `ConfigurationError` for a length, spacing or deviation that is not positive.
    """

    def __init__(
        self,
        partition: GridPartition,
        deviation: float | Sequence[float],
        length: float,
        spacing: float | Sequence[float] = 1.0,
    ) -> None:
        axes, channels = len(partition.shape), partition.channels
        spacings = _each("spacing", spacing, axes, "axis")
        deviations = _each("deviation", deviation, channels, "channel")
        (length,) = _each("length", length, 1, "covariance")
        self.partition = partition
        cells = tuple(length / width for width in spacings)
        scale = matern_scale(cells)
        self._cells = cells
        self._scale = scale * torch.tensor(deviations, dtype=torch.float64)
        self._one = GridPartition(
            partition.comm,
            partition.shape,
            1,
            tuple("periodic" if rule == "periodic" else "replicate" for rule in partition.boundary),
            ownership=[[stop - start for start, stop in ranges] for ranges in partition.ranges],
        )
        self._objects = PetscObjects(partition.comm)
        self._matrix = StencilJacobian(self._one, 1).assemble(_laplacian(self._one, cells), 1.0)
        self._matrix.setOption(PETSc.Mat.Option.SPD, True)
        self._objects.add(self._matrix)
        self._ksp = PETSc.KSP().create(comm=partition.comm)
        self._objects.add(self._ksp)
        self._ksp.setOperators(self._matrix)
        self._ksp.setType(PETSc.KSP.Type.CG)
        # Multigrid needs fewer iterations, but its set-up is random, so that a second one rounds differently.
        self._ksp.getPC().setType(PETSc.PC.Type.JACOBI)
        self._ksp.setTolerances(rtol=_RTOL, atol=0.0, max_it=_MOST_ITERATIONS)
        self._ksp.setErrorIfNotConverged(True)
        self._before, self._after = self._matrix.createVecs()
        self._objects.add(self._before)
        self._objects.add(self._after)

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        """Leave the PETSc objects to be destroyed together with those of the other ranks."""
        if not at_exit() and hasattr(self, "_objects"):
            self._objects.leave()

    def root(self, x: torch.Tensor) -> torch.Tensor:
        """Return L x. Collective."""
        return self._each_field(x, self._ksp.solve) * self._scale

    def root_solve(self, x: torch.Tensor) -> torch.Tensor:
        """Return L^-1 x. Collective."""
        return self._each_field(x / self._scale, self._matrix.mult)

    def variances(self, like: torch.Tensor) -> torch.Tensor:
        """Return the variance of each entry, from the modes of the Laplacian, sines and cosines. Not collective."""
        grid = self.partition
        modes = [
            _modes(points, rule == "periodic", cell, owned)
            for points, rule, cell, owned in zip(grid.shape, grid.boundary, self._cells, grid.owned, strict=True)
        ]
        (numbers, weights), *others = modes
        unit = torch.zeros(grid.local_shape[:-1], dtype=torch.float64)
        # One mode of the first axis at a time: all of them together are as many as the points of the whole grid.
        for number, weight in zip(numbers, weights.unbind(1), strict=True):
            total = 1 + number
            for other, _ in others:
                total = total[..., None] + other
            inner = total**-2
            for axis, (_, squares) in enumerate(others):
                inner = torch.tensordot(squares, inner, dims=([1], [axis])).movedim(0, axis)
            unit += weight.view(-1, *[1] * len(others)) * inner
        return (unit[..., None] * self._scale**2).expand(like.shape).clone()

    def _each_field(self, x: torch.Tensor, apply: Callable[[PETSc.Vec, PETSc.Vec], None]) -> torch.Tensor:
        own = self.partition.local_shape
        if tuple(x.shape[x.dim() - len(own) :]) != own:
            raise ConfigurationError(
                f"covariance: a vector of shape {tuple(x.shape)}: must be [..., {own}] on this rank"
            )
        fields = x.detach().double().reshape(-1, *own).movedim(-1, 1).flatten(2).flatten(0, 1)
        images = torch.empty_like(fields)
        for field, image in zip(fields, images, strict=True):
            vectors.fill(self._before, field)
            apply(self._before, self._after)
            image.copy_(vectors.view(self._after, (image.numel(),)))
        return images.view(-1, own[-1], *own[:-1]).movedim(1, -1).reshape(x.shape)


def _laplacian(grid: GridPartition, cells: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the sum of second differences of a flat local field, each times the squared length in cells."""

    def apply(flat: torch.Tensor) -> torch.Tensor:
        field = flat.view(grid.local_shape)
        wide = halo(field, grid, 1)
        total = torch.zeros_like(field)
        for axis, length in enumerate(cells):
            inner = wide
            for other in range(len(cells)):
                if other != axis:
                    inner = inner.narrow(other, 1, field.shape[other])
            points = field.shape[axis]
            total += length**2 * (inner.narrow(axis, 0, points) - 2 * field + inner.narrow(axis, 2, points))
        return total.reshape(-1)

    return apply


def _modes(points: int, periodic: bool, cell: float, owned: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of minus a line's scaled second difference, and squares of eigenvectors `[owned, mode]`.

    Those of a periodic line are one over its length for a sine and a cosine together.
    """
    number, place = torch.arange(points, dtype=torch.float64), torch.arange(*owned, dtype=torch.float64)
    angle = math.pi * number / points
    if periodic:
        squares = torch.full((len(place), points), 1 / points, dtype=torch.float64)
        return 4 * cell**2 * angle.sin().square(), squares
    squares = (1 + torch.cos(angle * (2 * place[:, None] + 1))) / points
    squares[:, 0] = 1 / points
    return 4 * cell**2 * (angle / 2).sin().square(), squares


def _each(name: str, given: float | Sequence[float], count: int, of: str) -> tuple[float, ...]:
    values = (float(given),) * count if isinstance(given, int | float) else tuple(map(float, given))
    if len(values) != count or not all(0 < value < float("inf") for value in values):
        raise ConfigurationError(f"covariance: {name} = {given!r}: must be positive, one number or one for each {of}")
    return values
