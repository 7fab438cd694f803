"""Isotropic spectra: they hold the energy of the field, each wave at its place."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pnode_dist.problems.qg.spectra import all_waves, isotropic, resolved, wave_numbers

LENGTH = 3e5


def density(field: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.rfft2(field)) ** 2 / field.size**2


@pytest.mark.parametrize("shape", [(8, 12), (9, 7), (12, 8)])
def test_all_waves_sum_to_the_mean_square(shape: tuple[int, int]) -> None:
    field = np.random.default_rng(1).standard_normal((3, *shape))
    found = all_waves(np.stack([density(each) for each in field]), shape[1]).sum((-2, -1))
    np.testing.assert_allclose(found, np.square(field).mean((1, 2)), rtol=1e-13)


def test_the_summed_spectrum_integrates_to_the_mean_square_of_the_waves_inside() -> None:
    shape = (16, 20)
    y, x = np.meshgrid(np.arange(16) / 16, np.arange(20) / 20, indexing="ij")
    # Of amplitudes 2 and 3: mean squares 2 and 4.5.
    field = 2 * np.cos(2 * math.pi * (2 * x + y)) + 3 * np.sin(2 * math.pi * (x - 4 * y))
    wave_number, spectrum = isotropic(density(field), shape, LENGTH, summed=True)
    width = wave_number[1] - wave_number[0]
    assert (spectrum * width).sum() == pytest.approx(6.5, rel=1e-12)
    # The cells are squares: the domain is 0.8 as high as long.
    unit = 2 * math.pi / LENGTH
    for first, second, square in ((2, 1, 2), (1, 4, 4.5)):
        place = int(unit * math.hypot(first, second / 0.8) / width)
        assert spectrum[place] * width == pytest.approx(square, rel=1e-12)


def test_a_field_of_equal_waves_has_a_spectrum_that_grows_like_the_circumference() -> None:
    # All waves of the plane equal 1, but rfft2 stores the shortest column's once: the mean of a ring is below 2 there.
    wave_number, spectrum = isotropic(np.ones((64, 33)), (64, 64), LENGTH)
    inner = slice(1, -1)
    circumference = 2 * math.pi * wave_number / (2 * math.pi / LENGTH) ** 2
    ratio = spectrum / circumference
    # The axis of half weight is a smaller part of wider rings.
    assert np.all(ratio[inner] > 0.85)
    assert np.all(ratio[inner] <= 1)


def test_wave_numbers_are_those_of_square_cells() -> None:
    along_y, along_x = wave_numbers((6, 8), LENGTH)
    assert along_x[0] == pytest.approx(2 * math.pi / LENGTH * np.arange(5))
    assert along_y[:, 0] == pytest.approx(2 * math.pi / (0.75 * LENGTH) * np.array([0, 1, 2, -3, -2, -1]))


@pytest.mark.parametrize(("points", "first"), [(64, 21), (256, 84), (32, 11)])
def test_spectra_count_up_to_the_first_wave_that_the_filter_damps(points: int, first: int) -> None:
    # 0.65 pi radians per cell are 0.325 waves per point.
    assert resolved((points, points), LENGTH) == pytest.approx(2 * math.pi / LENGTH * first)
