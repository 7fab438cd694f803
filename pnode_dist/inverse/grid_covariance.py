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

    `inside`, booleans `[*local_shape[:-1]]` of this rank, is the domain of a field that does not fill the grid, such as
    the sea. Its edge has a zero derivative, so nothing is correlated across land that separates two seas. The variance
    grows towards edges, and most in a part much smaller than the length. Values outside are independent of all others,
    with the standard deviation `deviation`.

    Vectors are `[..., *local_shape]`. Linear systems are solved by PETSc's conjugate gradients to a relative residual
    of 1e-13. Every call is collective on the partition's communicator.
    F. Lindgren, H. Rue, J. Lindstrom: An explicit link between Gaussian fields and Gaussian Markov random fields, J. R.
    Stat. Soc. B 73 (2011).

    Raises `ConfigurationError` for a length, spacing or deviation that is not positive, and for `inside` of another
    shape.
    """

    def __init__(
        self,
        partition: GridPartition,
        deviation: float | Sequence[float],
        length: float,
        spacing: float | Sequence[float] = 1.0,
        inside: torch.Tensor | None = None,
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
        self._inside = inside
        if inside is not None:
            if tuple(inside.shape) != partition.local_shape[:-1]:
                raise ConfigurationError(
                    f"covariance: inside has shape {tuple(inside.shape)}: must be {partition.local_shape[:-1]} on this "
                    "rank"
                )
            self._scale = torch.where(inside[..., None], self._scale, self._scale / scale)
        self._one = GridPartition(
            partition.comm,
            partition.shape,
            1,
            tuple("periodic" if rule == "periodic" else "replicate" for rule in partition.boundary),
            ownership=[[stop - start for start, stop in ranges] for ranges in partition.ranges],
        )
        self._objects = PetscObjects(partition.comm)
        self._matrix = StencilJacobian(self._one, 1).assemble(_laplacian(self._one, cells, inside), 1.0)
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
        """Return the variance of each entry.

        It follows from the modes of the Laplacian, sines and cosines. With `inside` it is collective: each rank factors
        the matrix of the whole grid, and solves for each of its points.
        """
        if self._inside is not None:
            return self._solved_variances().expand(like.shape).clone()
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

    def _solved_variances(self) -> torch.Tensor:
        """Return the sum of squares of each row of L, which is symmetric, as the norm of a column. Collective."""
        every = PETSc.IS().createStride(self._matrix.getSize()[0], comm=PETSc.COMM_SELF)
        (whole,) = self._matrix.createSubMatrices(every)
        factor = PETSc.PC().create(comm=PETSc.COMM_SELF)
        factor.setType(PETSc.PC.Type.LU)
        factor.setOperators(whole)
        unit, column = whole.createVecs()
        first, stop = self._matrix.getOwnershipRange()
        squares = torch.empty(stop - first, dtype=torch.float64)
        for number in range(first, stop):
            unit.setValue(number, 1.0)
            unit.assemble()
            factor.apply(unit, column)
            squares[number - first] = column.norm() ** 2
            unit.setValue(number, 0.0)
        for made in (every, whole, factor, unit, column):
            made.destroy()
        return squares.view(self.partition.local_shape[:-1])[..., None] * self._scale**2

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


def _laplacian(
    grid: GridPartition, cells: Sequence[float], inside: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the sum of second differences of a flat local field, each times the squared length in cells.

    Differences between a point inside and one outside, and between points outside, are left out.
    """
    own = torch.ones(grid.local_shape, dtype=torch.float64)
    if inside is not None:
        own = own * inside[..., None]
    around = halo(own, grid, 1)

    def apply(flat: torch.Tensor) -> torch.Tensor:
        field = flat.view(grid.local_shape)
        wide = halo(field, grid, 1)
        total = torch.zeros_like(field)
        for axis, length in enumerate(cells):
            before, after = (
                own * _neighbour(around, axis, side, field.shape) * (_neighbour(wide, axis, side, field.shape) - field)
                for side in (0, 2)
            )
            total += length**2 * (before + after)
        return total.reshape(-1)

    return apply


def _neighbour(wide: torch.Tensor, axis: int, side: int, shape: Sequence[int]) -> torch.Tensor:
    """Return each point's neighbour along an axis, the one before (side 0) or after (2), from a field with its halo."""
    for other, points in enumerate(shape[:-1]):
        wide = wide.narrow(other, side if other == axis else 1, points)
    return wide


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
