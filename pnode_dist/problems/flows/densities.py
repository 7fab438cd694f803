"""Densities in the plane: seeded samples, and the log density where a formula exists.

Shapes and sizes are those of FFJORD's experiments (W. Grathwohl et al., ICLR 2019, figure 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
LogDensity = Callable[[Array], Array]

_MOON, _RING, _CLOUD = 0.2, 0.08, 0.5 / math.sqrt(2)
_RADII = (0.75, 1.5, 2.25, 3.0)
_NODES = 128
_AT_ONCE = 4096


@dataclass(frozen=True)
class Density:
    """A density with its sampler: `sample(count, generator)` draws points `[count, dimension]`.

    `log_density` takes points `[point, dimension]` and returns nats. It is None if no formula exists.
    """

    sample: Callable[[int, np.random.Generator], Array]
    log_density: LogDensity | None


def mixture_log_density(points: Array, centres: Array, weights: Array, deviation: float) -> Array:
    """Return the log density `[point]` of a mixture of normals around `centres`, with one deviation and `weights`."""
    found = np.empty(len(points))
    for begin in range(0, len(points), _AT_ONCE):
        block = points[begin : begin + _AT_ONCE]
        squares = ((block[:, None] - centres) ** 2).sum(axis=-1) / (2 * deviation**2)
        nearest = squares.min(axis=1)
        found[begin : begin + _AT_ONCE] = np.log(np.exp(nearest[:, None] - squares) @ weights) - nearest
    return found - math.log(2 * math.pi * deviation**2)


def _moons() -> Density:
    """Half circles of radius 2 with normal noise. The second is rotated by 180 degrees and shifted into the first.

    The density is an integral along both arcs, evaluated by Gauss quadrature to rounding error.
    """

    def curve(lower: npt.NDArray[np.bool_], angle: Array) -> Array:
        x, y = 2 * np.cos(angle) - 1, 2 * np.sin(angle) - 0.2
        point: Array = np.stack([np.where(lower, -x, x), np.where(lower, 0.6 - y, y)], axis=-1)
        return point

    def sample(count: int, generator: np.random.Generator) -> Array:
        points = curve(generator.integers(0, 2, count) == 1, generator.uniform(0, math.pi, count))
        return points + _MOON * generator.normal(size=(count, 2))

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    angles = math.pi * (nodes + 1) / 2
    centres = np.concatenate([curve(np.full(_NODES, lower), angles) for lower in (False, True)])
    shares = np.concatenate([weights, weights]) / 4
    return Density(sample, lambda points: mixture_log_density(points, centres, shares, _MOON))


def _rings() -> Density:
    """Circles around the origin with normal noise, of equal probability.

    For a circle of radius R, the density at a distance r is exp(-(r^2 + R^2) / 2 s^2) I0(r R / s^2) / 2 pi s^2.
    """
    radii = np.array(_RADII)

    def sample(count: int, generator: np.random.Generator) -> Array:
        radius, angle = radii[generator.integers(0, len(radii), count)], generator.uniform(0, 2 * math.pi, count)
        points: Array = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return points + _RING * generator.normal(size=(count, 2))

    def log_density(points: Array) -> Array:
        distance = torch.from_numpy(np.linalg.norm(points, axis=-1))[:, None]
        exponent = -((distance - torch.from_numpy(radii)) ** 2) / (2 * _RING**2)
        bessel = torch.special.i0e(distance * torch.from_numpy(radii) / _RING**2)
        found: Array = (exponent + bessel.log()).logsumexp(dim=1).numpy()
        return found - math.log(len(radii) * 2 * math.pi * _RING**2)

    return Density(sample, log_density)


def _pinwheel(count: int, generator: np.random.Generator) -> Array:
    """Five arms: elongated clouds, with a rotation that grows with the distance from the origin."""
    along, across = generator.normal(size=(2, count)) * [[0.3], [0.1]] + [[1.0], [0.0]]
    angle = 2 * math.pi * generator.integers(0, 5, count) / 5 + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2 * np.stack([along * cos - across * sin, along * sin + across * cos], axis=-1)


def _eight_gaussians() -> Density:
    """Normal distributions centred on eight points of a circle."""
    angle = math.pi * np.arange(8) / 4
    centres = 2 * math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], axis=-1)

    def sample(count: int, generator: np.random.Generator) -> Array:
        drawn: Array = centres[generator.integers(0, 8, count)] + _CLOUD * generator.normal(size=(count, 2))
        return drawn

    return Density(sample, lambda points: mixture_log_density(points, centres, np.full(8, 1 / 8), _CLOUD))


def _checkerboard() -> Density:
    """Uniform on eight of the sixteen squares of side 2 in [-4, 4]^2."""

    def sample(count: int, generator: np.random.Generator) -> Array:
        column, row = generator.integers(0, 4, count), generator.integers(0, 2, count)
        corner = np.stack([column, 2 * row + column % 2], axis=-1)
        drawn: Array = 2 * (corner + generator.uniform(size=(count, 2))) - 4
        return drawn

    def log_density(points: Array) -> Array:
        column, row = np.floor((points + 4) / 2).T
        inside = (np.abs(points) < 4).all(axis=-1) & ((column + row) % 2 == 0)
        found: Array = np.where(inside, -math.log(32), -math.inf)
        return found

    return Density(sample, log_density)


PLANAR_DENSITIES: dict[str, Callable[[], Density]] = {
    "moons": _moons,
    "rings": _rings,
    "pinwheel": lambda: Density(_pinwheel, None),
    "8gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
}
"""Densities by their names in configurations."""
