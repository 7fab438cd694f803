"""Filters to a coarser grid at every number of ranks: sums over waves in numpy, and the diffusion of GCM-Filters."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.coarsening import Coarsening, refined, subgrid_forcing
from pnode_dist.problems.qg.config import EDDY, Operator, QGParameters
from pnode_dist.problems.qg.physics import QGTendency
from tests.oracles import quasi_geostrophic

pytestmark = pytest.mark.mpi

FINE, COARSE = (24, 32), (12, 16)
LENGTH = 5e5
PARAMETERS = QGParameters(LENGTH)
REFERENCE = Path(__file__).parents[1] / "oracles" / "gcm_filters_reference.npz"
WAVES = pytest.mark.parametrize("operator", ["sharp", "gaussian"])
RATIO = pytest.mark.parametrize("ratio", [2, 3, 4])
SPLIT = pytest.mark.parametrize("split", ["slabs", "blocks"])


def grid(mesh: Mesh, shape: tuple[int, int], split: str = "slabs") -> GridPartition:
    return GridPartition(mesh, shape, 2, "periodic", 1, (mesh.state_ranks, 1) if split == "slabs" else None)


def part(partition: GridPartition, whole: np.ndarray) -> torch.Tensor:
    """This rank's part of a whole field `[layer, y, x]`, layers last."""
    last = torch.from_numpy(np.ascontiguousarray(np.moveaxis(whole, 0, -1)))
    return last[(..., *partition.owned_slices(partition.comm.rank))].clone()


def wave(shape: tuple[int, int], m: int, n: int) -> np.ndarray:
    """A wave, m times along y and n times along x, and another one with other waves in the second layer."""
    y, x = np.arange(shape[0])[:, None] / shape[0], np.arange(shape[1]) / shape[1]
    return np.stack([np.cos(2 * np.pi * (m * y + n * x) + 0.3), np.sin(2 * np.pi * (m * y - n * x))])


def close(found: torch.Tensor, partition: GridPartition, whole: np.ndarray, scale: np.ndarray | None = None) -> None:
    """Assert that a part is that of a whole field, to 1e-12 of the largest value of it or of `scale`."""
    largest = np.abs(whole if scale is None else scale).max()
    torch.testing.assert_close(found, part(partition, whole), rtol=0, atol=1e-12 * largest)


def field(shape: tuple[int, int] = FINE) -> np.ndarray:
    """A random field without the waves that the coarse grid holds up to a sign."""
    spectrum = np.fft.fft2(1e-5 * np.random.default_rng(0).standard_normal((2, *shape)))
    spectrum[:, [COARSE[0] // 2, -COARSE[0] // 2]] = 0
    spectrum[:, :, [COARSE[1] // 2, -COARSE[1] // 2]] = 0
    return np.fft.ifft2(spectrum).real


@WAVES
@SPLIT
def test_coarse_fields_are_the_damped_sum_of_their_waves(operator: Operator, split: str, mesh: Mesh) -> None:
    fine, coarse = grid(mesh, FINE, split), grid(mesh, COARSE, split)
    whole = field()
    found = Coarsening(fine, coarse, operator, PARAMETERS)(part(fine, whole))
    expected = part(coarse, quasi_geostrophic.coarsened(whole, COARSE, operator))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * np.abs(whole).max())


@WAVES
def test_the_forcing_is_the_difference_of_filtered_and_coarse_tendencies(operator: Operator, mesh: Mesh) -> None:
    fine, coarse = grid(mesh, FINE), grid(mesh, COARSE)
    # No product of two waves reaches the waves of half the coarse points.
    spectrum = np.fft.fft2(field())
    for axis, points in ((1, 5), (2, 7)):
        frequency = np.abs(np.fft.fftfreq(spectrum.shape[axis], 1 / spectrum.shape[axis]))
        spectrum = np.moveaxis(np.moveaxis(spectrum, axis, -1) * (frequency <= points // 2), -1, axis)
    whole = np.fft.ifft2(spectrum).real
    low, forcing = subgrid_forcing(
        Coarsening(fine, coarse, operator, PARAMETERS),
        QGTendency(fine, PARAMETERS),
        QGTendency(coarse, PARAMETERS),
        part(fine, whole),
    )
    whole_low = quasi_geostrophic.coarsened(whole, COARSE, operator)
    rate = quasi_geostrophic.tendency(whole, LENGTH)
    expected = quasi_geostrophic.coarsened(rate, COARSE, operator) - quasi_geostrophic.tendency(whole_low, LENGTH)
    torch.testing.assert_close(low, part(coarse, whole_low), rtol=0, atol=1e-12 * np.abs(whole).max())
    torch.testing.assert_close(forcing, part(coarse, expected), rtol=0, atol=1e-12 * np.abs(rate).max())


def test_a_field_of_the_waves_that_the_filter_keeps_has_no_forcing(mesh: Mesh) -> None:
    fine, coarse = grid(mesh, FINE), grid(mesh, COARSE)
    y, x = np.arange(FINE[0])[:, None] / FINE[0], np.arange(FINE[1]) / FINE[1]
    whole = 1e-5 * np.stack([np.sin(2 * np.pi * (x + y)), np.cos(2 * np.pi * (x - 2 * y))])
    low, forcing = subgrid_forcing(
        Coarsening(fine, coarse), QGTendency(fine, EDDY), QGTendency(coarse, EDDY), part(fine, whole)
    )
    torch.testing.assert_close(low, part(coarse, whole[:, ::2, ::2]), rtol=0, atol=1e-19)
    rate = np.abs(quasi_geostrophic.tendency(whole, EDDY.L)).max()
    assert forcing.abs().max().item() <= 1e-12 * rate


@RATIO
@SPLIT
def test_diffused_fields_are_those_of_gcm_filters(ratio: int, split: str, mesh: Mesh) -> None:
    with np.load(REFERENCE) as file:
        q, low, again = (file[name] for name in ("q", f"q_{ratio}", f"again_{ratio}"))
    fine, coarse = grid(mesh, q.shape[1:], split), grid(mesh, low.shape[1:], split)
    coarsening = Coarsening(fine, coarse, "diffusion")
    close(coarsening(part(fine, q)), coarse, low)
    close(coarsening(refined(coarsening, part(coarse, low))), coarse, again)


@RATIO
def test_the_forcing_by_diffusion_is_that_of_its_states_in_real_space(ratio: int, mesh: Mesh) -> None:
    with np.load(REFERENCE) as file:
        q, low, rate = (file[name] for name in ("q", f"q_{ratio}", f"rate_{ratio}"))
    fine, coarse = grid(mesh, q.shape[1:]), grid(mesh, low.shape[1:])
    found, forcing = subgrid_forcing(
        Coarsening(fine, coarse, "diffusion"),
        QGTendency(fine, PARAMETERS),
        QGTendency(coarse, PARAMETERS),
        part(fine, q),
    )
    close(found, coarse, low)
    close(forcing, coarse, rate - quasi_geostrophic.tendency(low, LENGTH), rate)


def test_a_field_refined_by_diffusion_is_its_cells_smoothed_by_gcm_filters(mesh: Mesh) -> None:
    with np.load(REFERENCE) as file:
        low, spread = file["q_4"], file["spread_4"]
    fine, coarse = grid(mesh, spread.shape[1:]), grid(mesh, low.shape[1:])
    close(refined(Coarsening(fine, coarse, "diffusion"), part(coarse, low)), fine, spread)


@WAVES
@pytest.mark.parametrize("numbers", [(1, 2), (3, 5), (-5, 6)])
def test_a_refined_wave_is_damped_once_and_coarsened_twice(
    operator: Operator, numbers: tuple[int, int], mesh: Mesh
) -> None:
    fine, coarse = grid(mesh, FINE), grid(mesh, COARSE)
    coarsening = Coarsening(fine, coarse, operator, PARAMETERS)
    factor = quasi_geostrophic.coarse_factor(*numbers, COARSE, operator)
    low, whole = wave(COARSE, *numbers), wave(FINE, *numbers)
    found = refined(coarsening, part(coarse, low))
    close(found, fine, factor * whole, whole)
    close(coarsening(found), coarse, factor**2 * low, low)


@pytest.mark.parametrize("operator", get_args(Operator))
def test_refining_is_the_transpose_of_coarsening(operator: Operator, mesh: Mesh) -> None:
    fine, coarse = grid(mesh, FINE), grid(mesh, COARSE)
    coarsening = Coarsening(fine, coarse, operator, PARAMETERS)
    random = np.random.default_rng(1)
    whole, low = (part(one, random.standard_normal((2, *one.shape))) for one in (fine, coarse))
    products = torch.stack([(refined(coarsening, low) * whole).sum(), 4 * (low * coarsening(whole)).sum()])
    spread, averaged = mesh.sum(products)
    torch.testing.assert_close(spread, averaged, rtol=1e-12, atol=0)


def test_diffusion_between_grids_without_whole_cells_is_refused(mesh: Mesh) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^coarsening: shape = \(8, 12\): with diffusion must divide \(20, 30"
    ):
        Coarsening(grid(mesh, (20, 30)), grid(mesh, (8, 12)), "diffusion")


@pytest.mark.parametrize("shape", [(11, 16), (24, 32), (12, 12), (48, 64)])
def test_grids_that_are_odd_or_not_coarser_are_refused(shape: tuple[int, int], mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"^coarsening: shape = .*: must be even"):
        Coarsening(grid(mesh, FINE), grid(mesh, shape))
