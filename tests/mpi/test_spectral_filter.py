"""A filter of Fourier modes is that of the whole field, as a layer and between the steps of a solve."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh, SpectralPartition, odeint
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import SpectralFilter
from tests.mpi.grids import block
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

SHAPES = [(8, 11), (9,), (9, 8), (6, 5, 7)]


def damping(shape: tuple[int, ...], half: bool) -> torch.Tensor:
    """exp(-20 sum_axes (2 |m| / n)^8) for all modes of a whole spectrum, `[*spectrum, 1]`."""
    exponents = torch.zeros(1, dtype=torch.float64)
    for axis, n in enumerate(shape):
        halved = half and axis == len(shape) - 1
        frequencies = (torch.fft.rfftfreq if halved else torch.fft.fftfreq)(n, dtype=torch.float64).abs()
        shaped = (2 * frequencies).pow(8).view([-1 if other == axis else 1 for other in range(len(shape))])
        exponents = exponents + shaped
    return torch.exp(-20 * exponents).unsqueeze(-1)


def filtered(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The filter on a whole field."""
    dim = list(range(-1 - len(shape), -1))
    if x.is_complex():
        return torch.fft.ifftn(damping(shape, half=False) * torch.fft.fftn(x, dim=dim), dim=dim)
    return torch.fft.irfftn(damping(shape, half=True) * torch.fft.rfftn(x, dim=dim), s=shape, dim=dim)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_whole_field(shape: tuple[int, ...], half: bool, mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, shape, channels=2), half)
    layer = SpectralFilter.exponential(spectrum, order=8, strength=20.0)
    whole = random(3, *shape, 2)
    whole = whole if half else torch.complex(whole, random(3, *shape, 2, seed=2))
    alone, local = whole.clone().requires_grad_(), block(spectrum.grid, whole).clone().requires_grad_()
    wanted, found = filtered(alone, shape), layer(local)
    assert distance(found, block(spectrum.grid, wanted)) <= 1e-13
    (theirs,) = torch.autograd.grad(wanted.abs().pow(3).sum(), alone)
    (mine,) = torch.autograd.grad(found.abs().pow(3).sum(), local)
    assert distance(mine, block(spectrum.grid, theirs)) <= 1e-12


def test_single_precision_is_kept_and_nothing_is_saved_in_the_state_dict(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (8, 11)))
    layer = SpectralFilter.dealiasing(spectrum)
    found = layer(block(spectrum.grid, random(8, 11, 1, dtype=torch.float32)))
    assert found.dtype == torch.float32
    assert distance(layer(found), found) <= 1e-6
    assert layer.state_dict() == {}


def test_between_steps_it_is_the_filter_of_the_whole_field(mesh: Mesh) -> None:
    shape, times = (8, 11), [0.0, 0.1, 0.2, 0.3]
    spectrum = SpectralPartition(GridPartition(mesh, shape, channels=1))
    smooth = SpectralFilter.exponential(spectrum, order=8, strength=20.0)
    whole = random(*shape, 1)
    alone, local = whole.clone().requires_grad_(), block(spectrum.grid, whole).clone().requires_grad_()

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u * u * (1 + t)

    states = [alone]
    for begin, end in pairwise(times):
        states.append(filtered(odeint_plain(func, states[-1], [begin, end], TABLEAUX["4"])[-1], shape))
    wanted = torch.stack(states)
    found = odeint(func, local, times, partition=spectrum.grid, step_size=0.1, between_steps=lambda t, u: smooth(u))
    assert distance(found, block(spectrum.grid, wanted)) <= 1e-12
    (theirs,) = torch.autograd.grad(wanted.sin().sum(), alone)
    (mine,) = torch.autograd.grad(found.sin().sum(), local)
    assert distance(mine, block(spectrum.grid, theirs)) <= 1e-12


def test_wrong_arguments_are_one_line() -> None:
    spectrum = SpectralPartition(GridPartition(MPI.COMM_SELF, (8, 9)))
    with pytest.raises(ConfigurationError, match=r"SpectralFilter: factors of torch.float32 and shape \(8, 5\)"):
        SpectralFilter(spectrum, torch.ones(8, 5))
    layer = SpectralFilter.dealiasing(spectrum)
    with pytest.raises(TypeError, match="SpectralFilter: a complex field for a spectrum with half = True"):
        layer(torch.ones(8, 9, 1, dtype=torch.complex64))
