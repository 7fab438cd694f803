"""Filters to a coarser grid at every number of ranks: sums over waves of the whole field in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.coarsening import Coarsening, subgrid_forcing
from pnode_dist.problems.qg.config import EDDY, Operator, QGParameters
from pnode_dist.problems.qg.physics import QGTendency
from tests.oracles import quasi_geostrophic

pytestmark = pytest.mark.mpi

FINE, COARSE = (24, 32), (12, 16)
LENGTH = 5e5
PARAMETERS = QGParameters(LENGTH)
OPERATORS = pytest.mark.parametrize("operator", ["sharp", "gaussian"])
SPLIT = pytest.mark.parametrize("split", ["slabs", "blocks"])


def grid(mesh: Mesh, shape: tuple[int, int], split: str = "slabs") -> GridPartition:
    return GridPartition(mesh, shape, 2, "periodic", 1, (mesh.state_ranks, 1) if split == "slabs" else None)


def part(partition: GridPartition, whole: np.ndarray) -> torch.Tensor:
    """This rank's part of a whole field `[layer, y, x]`, layers last."""
    last = torch.from_numpy(np.ascontiguousarray(np.moveaxis(whole, 0, -1)))
    return last[(..., *partition.owned_slices(partition.comm.rank))].clone()


def field(shape: tuple[int, int] = FINE) -> np.ndarray:
    """A random field without the waves that the coarse grid holds up to a sign."""
    spectrum = np.fft.fft2(1e-5 * np.random.default_rng(0).standard_normal((2, *shape)))
    spectrum[:, [COARSE[0] // 2, -COARSE[0] // 2]] = 0
    spectrum[:, :, [COARSE[1] // 2, -COARSE[1] // 2]] = 0
    return np.fft.ifft2(spectrum).real


@OPERATORS
@SPLIT
def test_coarse_fields_are_the_damped_sum_of_their_waves(operator: Operator, split: str, mesh: Mesh) -> None:
    fine, coarse = grid(mesh, FINE, split), grid(mesh, COARSE, split)
    whole = field()
    found = Coarsening(fine, coarse, operator, PARAMETERS)(part(fine, whole))
    expected = part(coarse, quasi_geostrophic.coarsened(whole, COARSE, operator))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * np.abs(whole).max())


@OPERATORS
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


@pytest.mark.parametrize("shape", [(11, 16), (24, 32), (12, 12), (48, 64)])
def test_grids_that_are_odd_or_not_coarser_are_refused(shape: tuple[int, int], mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"^coarsening: shape = .*: must be even"):
        Coarsening(grid(mesh, FINE), grid(mesh, shape))
