"""Fourier transforms of a partitioned line are those of torch.fft, with any number of fields and channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh, NeuralODE, SpectralPartition, Trajectory
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import fft, fft2, fftn, ifft, ifftn, irfft, irfftn, rfft, rfftn
from pnode_dist.nn import SpectralConv1d, SpectralConv2d
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.grids import block
from tests.mpi.test_compiled_exchange import assert_same_when_compiled
from tests.mpi.test_fft import (
    Counting,
    assert_same_as_whole,
    assert_transposed,
    complex_field,
)
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

# Points, leading axes and channels: 6 lines, 1 line, 3 and 7.
FIELDS = [(11, (2,), 3), (8, (), 1), (9, (3, 1), 1), (12, (), 7)]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("n", "leading", "channels"), FIELDS, ids=str)
def test_values_and_gradients_are_those_of_the_whole_field(
    n: int, leading: tuple[int, ...], channels: int, half: bool, mesh: Mesh
) -> None:
    assert_same_as_whole(SpectralPartition(GridPartition(mesh, (n,)), half), leading, channels)


def test_blocks_of_uneven_sizes_have_the_same_transform(mesh: Mesh) -> None:
    sizes = [1] * (mesh.size - 1) + [10 - mesh.size + 1]
    assert_same_as_whole(SpectralPartition(GridPartition(mesh, (10,), ownership=[sizes])), channels=3)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_transforms_of_one_axis_are_those_of_torch(norm: str, mesh: Mesh) -> None:
    grid = GridPartition(mesh, (9,))
    half, full = SpectralPartition(grid), SpectralPartition(grid, half=False)
    whole, spectral = random(2, 9, 2), complex_field(2, 9, 2)
    there, back = block(half.blocks, spectral[:, :5]), block(full.blocks, spectral)
    pairs = [
        (rfft(block(grid, whole), half, norm), block(half.blocks, torch.fft.rfft(whole, dim=-2, norm=norm))),
        (fft(block(grid, whole), full, norm), block(full.blocks, torch.fft.fft(whole, dim=-2, norm=norm))),
        (ifft(back, full, norm), block(grid, torch.fft.ifft(spectral, dim=-2, norm=norm))),
        (irfft(there, half, norm), block(grid, torch.fft.irfft(spectral[:, :5], 9, dim=-2, norm=norm))),
    ]
    for found, wanted in pairs:
        assert distance(found, wanted) <= 1e-12
    local = block(grid, whole)
    assert torch.equal(rfft(local, half), rfftn(local, half))
    assert torch.equal(fft(local, full), fftn(local, full))
    assert torch.equal(irfft(there, half), irfftn(there, half))
    assert torch.equal(ifft(back, full), ifftn(back, full))


@pytest.mark.parametrize("n", [8, 9])
def test_the_adjoint_of_a_transform_is_its_transpose(n: int, mesh: Mesh) -> None:
    assert_transposed(SpectralPartition(GridPartition(mesh, (n,))), 3)


def test_a_transform_keeps_single_precision(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (10,)))
    whole = random(10, 3, dtype=torch.float32)
    found = rfft(block(spectrum.grid, whole), spectrum)
    assert found.dtype == torch.complex64
    assert distance(found, block(spectrum.blocks, torch.fft.rfft(whole, dim=-2))) <= 1e-6
    back = irfft(found, spectrum)
    assert back.dtype == torch.float32
    assert distance(back, block(spectrum.grid, whole)) <= 1e-6


@pytest.mark.parametrize("half", [True, False])
def test_a_batch_without_a_field_has_an_empty_transform_and_gradient(half: bool, mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (8,), 2), half)
    there, back = (rfft, irfft) if half else (fft, ifft)
    x = torch.zeros(3, 0, *spectrum.grid.local_shape, dtype=torch.float64, requires_grad=True)
    spectral = there(x, spectrum)
    assert spectral.shape == (3, 0, *spectrum.local_shape)
    found = back(spectral, spectrum)
    assert found.shape == x.shape
    (gradient,) = torch.autograd.grad(found.abs().sum(), x)
    assert gradient.shape == x.shape


def test_second_derivatives_are_those_of_the_whole_field(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (7,)))
    whole, weight = random(7, 2), random(7, 2, seed=3)

    def twice(x: torch.Tensor, weight: torch.Tensor, energy: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        return torch.autograd.grad((weight * first).sum(), x)[0]

    wanted = twice(whole, weight, lambda x: torch.fft.rfft(x, dim=-2).abs().pow(4))
    found = twice(block(spectrum.grid, whole), block(spectrum.grid, weight), lambda x: rfft(x, spectrum).abs().pow(4))
    assert distance(found, block(spectrum.grid, wanted)) <= 1e-12


@pytest.mark.parametrize("lines", [1, 2, 7])
def test_ranks_with_lines_receive_one_message_from_each_rank(lines: int, mesh: Mesh) -> None:
    assert isinstance(mesh.state_comm, MPI.Intracomm)
    grid = GridPartition(Counting(mesh.state_comm), (9,))
    spectrum = SpectralPartition(grid)
    x = block(grid, random(9, lines)).clone().requires_grad_()
    others = [rank for rank in range(mesh.size) if rank != mesh.rank]
    # The points go to the ranks that have lines, and their wave numbers come back.
    there = [rank for rank in others if rank < lines]
    back = others if mesh.rank < lines else []
    Counting.sent.clear()
    modes = rfft(x, spectrum)
    assert Counting.sent == there + back
    Counting.sent.clear()
    torch.autograd.grad(modes.abs().sum(), x)
    assert Counting.sent == there + back


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges")
@pytest.mark.parametrize("kind", ["transform", "fewer lines than ranks", "layer"])
def test_a_compiled_transform_is_one_graph_with_the_same_gradients(kind: str, mesh: Mesh) -> None:
    channels = 1 if kind == "fewer lines than ranks" else 2
    grid = GridPartition(mesh, (11,), channels=channels)
    spectrum = SpectralPartition(grid)
    torch.manual_seed(0)
    function: Callable[[torch.Tensor], torch.Tensor] = (
        SpectralConv1d(grid, 2, 3, 4, dtype=torch.float64)
        if kind == "layer"
        else lambda x: irfft(rfft(x.sin(), spectrum).square(), spectrum)
    )
    leading = () if channels == 1 else (3,)
    assert_same_when_compiled(function, block(grid, random(*leading, 11, channels)).clone())


class Burgers(torch.nn.Module):
    """Burgers' equation with a learnt viscosity, dealiased."""

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        inverse: Callable[[torch.Tensor], torch.Tensor],
        number: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        super().__init__()
        self.forward_transform, self.inverse, self.number, self.mask = forward, inverse, number, mask
        self.viscosity = torch.nn.Parameter(torch.tensor(0.05, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        square = self.forward_transform(u * u) * self.mask
        smooth = self.viscosity * self.number**2 * self.forward_transform(u)
        return self.inverse(-0.5j * self.number * square - smooth)


def test_a_spectral_equation_has_the_solution_and_gradients_of_torch(mesh: Mesh) -> None:
    grid, single = GridPartition(mesh, (12,)), SpectralPartition(GridPartition(MPI.COMM_SELF, (12,)))
    spectrum, times = SpectralPartition(grid), [0.0, 0.2, 0.3]
    whole = random(2, 12, 1)
    own = Burgers(
        lambda u: rfft(u, spectrum), lambda s: irfft(s, spectrum), spectrum.wavenumbers()[0], spectrum.dealias()
    )
    every = Burgers(
        lambda u: torch.fft.rfft(u, dim=-2),
        lambda s: torch.fft.irfft(s, 12, dim=-2),
        single.wavenumbers()[0],
        single.dealias(),
    )
    start, alone = block(grid, whole).clone().requires_grad_(), whole.clone().requires_grad_()
    budget = Trajectory(ram_slots=1, keep="solution", schedule="revolve")
    found = NeuralODE(own, step_size=0.1, partition=grid, trajectory=budget)(start, times)
    wanted = odeint_plain(every, alone, times, TABLEAUX["4"], 0.1)
    assert distance(found.detach(), block(grid, wanted.detach())) <= 1e-12
    mine = torch.autograd.grad(found.pow(3).sum(), [start, own.viscosity])
    theirs = torch.autograd.grad(wanted.pow(3).sum(), [alone, every.viscosity])
    assert distance(mine[0], block(grid, theirs[0])) <= 1e-12
    assert distance(mesh.sum(mine[1]), theirs[1]) <= 1e-12


@pytest.mark.parametrize(("n", "modes"), [(10, 3), (9, 5)], ids=["few", "all"])
def test_a_fourier_layer_is_that_of_the_whole_field(n: int, modes: int, mesh: Mesh) -> None:
    torch.manual_seed(0)
    grid = GridPartition(mesh, (n,), channels=2)
    layer = SpectralConv1d(grid, 2, 3, modes, dtype=torch.float64)
    whole = random(2, n, 2)
    weight = layer.weight.detach().clone().requires_grad_()
    alone, local = whole.clone().requires_grad_(), block(grid, whole).clone().requires_grad_()
    low = torch.fft.rfft(alone, dim=-2)[:, :modes]
    # irfft appends zeros, which are the modes that the layer drops.
    wanted = torch.fft.irfft(torch.einsum("bxi,iox->bxo", low, weight[0]), n, dim=-2)
    found = layer(local)
    assert distance(found.detach(), block(grid, wanted.detach())) <= 1e-12
    theirs = torch.autograd.grad(wanted.pow(3).sum(), [alone, weight])
    mine = torch.autograd.grad(found.pow(3).sum(), [local, layer.weight])
    assert distance(mine[0], block(grid, theirs[0])) <= 1e-12
    assert distance(mesh.sum(torch.view_as_real(mine[1])), torch.view_as_real(theirs[1])) <= 1e-12


def test_wrong_arguments_are_one_line(mesh: Mesh) -> None:
    grid, plane = GridPartition(mesh, (8,)), GridPartition(mesh, (8, 9))
    half, full, flat = SpectralPartition(grid), SpectralPartition(grid, half=False), SpectralPartition(plane)
    x = torch.ones(grid.local_shape)
    wrong: dict[str, Callable[[], object]] = {
        "rfft: spectrum has half = False: must be True": lambda: rfft(x, full),
        r"fft2: spectrum of shape \(8,\): must have 2 axes": lambda: fft2(x, full),
        r"irfft: spectrum of shape \(8, 5\): must have 1 axis": lambda: irfft(x, flat),
        r"SpectralConv1d: modes = \(6,\): must be from \(1,\) to \(5,\)": lambda: SpectralConv1d(grid, 1, 1, 6),
        "SpectralConv1d: is for grids of 1 axis": lambda: SpectralConv1d(plane, 1, 1, 1),
        "SpectralConv2d: is for grids of 2 axes": lambda: SpectralConv2d(grid, 1, 1, 1),
        r"processes = \(1,\): is for grids of three axes": lambda: SpectralPartition(grid, processes=(1,)),
    }
    if mesh.size > 2:
        few = f"has {mesh.size // 2 + 1} wave numbers along x: must have at least one for each of {mesh.size} ranks"
        wrong[few] = lambda: SpectralPartition(GridPartition(mesh, (mesh.size,)))
    for message, call in wrong.items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="irfft: got shape"):
        irfft(torch.ones(1, 9, 1, dtype=torch.complex64), half)
