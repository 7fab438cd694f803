"""Densities in the plane: their formulas against quadrature and histograms, and the samples that they give."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from pnode_dist.problems.flows.config import PLANAR
from pnode_dist.problems.flows.densities import PLANAR_DENSITIES, LogDensity

KNOWN = [name for name in PLANAR if name != "pinwheel"]
CELLS, EDGE = 150, 5.0


def log_density(name: str) -> LogDensity:
    found = PLANAR_DENSITIES[name]().log_density
    assert found is not None
    return found


def on_grid(name: str) -> tuple[np.ndarray, float]:
    """The log density at the centres of cells of [-5, 5]^2, and a cell's area."""
    centres = EDGE * (2 * np.arange(CELLS) + 1 - CELLS) / CELLS
    points = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    return log_density(name)(points), (2 * EDGE / CELLS) ** 2


@pytest.mark.parametrize("name", KNOWN)
def test_a_density_integrates_to_one_and_is_that_of_its_samples(name: str) -> None:
    values, area = on_grid(name)
    mass = np.exp(values) * area
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    samples = PLANAR_DENSITIES[name]().sample(4000, np.random.default_rng(0))
    found = log_density(name)(samples)
    expected = (mass * np.where(mass > 0, values, 0)).sum()
    error = 5 * found.std() / math.sqrt(len(found)) + 1e-9
    assert found.mean() == pytest.approx(expected, abs=error)
    # Each quadrant holds as many samples as the density says.
    centres = EDGE * (2 * np.arange(CELLS) + 1 - CELLS) / CELLS
    x, y = np.meshgrid(centres, centres)
    for right in (False, True):
        for above in (False, True):
            share = mass[((x > 0) == right).ravel() & ((y > 0) == above).ravel()].sum()
            counted = (((samples[:, 0] > 0) == right) & ((samples[:, 1] > 0) == above)).mean()
            assert counted == pytest.approx(share, abs=5 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("point", [(-1.0, 1.8), (1.1, -0.3), (3.2, 1.2), (0.0, 0.0)])
def test_the_density_of_the_moons_is_the_integral_along_them(point: tuple[float, float]) -> None:
    x, y = point

    def normal(cx: float, cy: float) -> float:
        return math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.08) / (0.08 * math.pi)

    upper, _ = quad(lambda a: normal(2 * math.cos(a) - 1, 2 * math.sin(a) - 0.2), 0, math.pi, epsabs=1e-13)
    lower, _ = quad(lambda a: normal(1 - 2 * math.cos(a), 0.8 - 2 * math.sin(a)), 0, math.pi, epsabs=1e-13)
    expected = math.log((upper + lower) / (2 * math.pi))
    assert log_density("moons")(np.array([point]))[0] == pytest.approx(expected, abs=1e-9)


def test_the_pinwheel_has_five_arms_that_turn() -> None:
    samples = PLANAR_DENSITIES["pinwheel"]().sample(20_000, np.random.default_rng(0))
    # Turning keeps the distance to the centre: 2 |(1 + 0.3 a, 0.1 b)|.
    squares = (samples**2).sum(axis=1)
    assert squares.mean() == pytest.approx(4 * (1 + 0.3**2 + 0.1**2), rel=0.03)
    radius, angle = np.sqrt(squares) / 2, np.arctan2(samples[:, 1], samples[:, 0])
    off = (angle - 0.25 * np.exp(radius)) * 5
    # Turned back by what its distance says, every point lies on one of five rays, up to the width of an arm.
    assert abs(np.exp(1j * off).mean()) > 0.8
    assert abs(np.exp(1j * angle * 5).mean()) < 0.8
    assert abs(np.exp(1j * off / 5).mean()) < 0.03


@pytest.mark.parametrize("name", PLANAR)
def test_the_generator_fixes_the_samples(name: str) -> None:
    density = PLANAR_DENSITIES[name]()
    first, again, other = (density.sample(50, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (50, 2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
