"""Fourier transforms of partitioned fields: values and derivatives are those of torch.fft on the whole field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from mpi4py import MPI
from torch.autograd import forward_ad

from pnode_dist import GridPartition, Mesh, NeuralODE, SpectralPartition, Trajectory
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import (
    fft2,
    fftn,
    gather,
    ifft2,
    ifftn,
    irfft2,
    irfftn,
    redistribute,
    rfft2,
    rfftn,
)
from pnode_dist.nn import SpectralConv2d
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.grids import block
from tests.mpi.test_compiled_exchange import assert_same_when_compiled
from tests.mpi.test_exchange import inner, positive
from tests.oracles import mpi4py_fft
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

SHAPES = [(8, 10), (7, 9), (4, 6), (5, 4, 7), (4, 6, 3)]
Field = Callable[[torch.Tensor], torch.Tensor]


def complex_field(*shape: int, seed: int = 1) -> torch.Tensor:
    """Complex normal numbers, the same in every process."""
    return torch.complex(random(*shape, seed=seed), random(*shape, seed=seed + 1000))


def axes(partition: GridPartition | SpectralPartition) -> list[int]:
    """The axes of the grid, counted from the end."""
    return list(range(-1 - len(partition.shape), -1))


def squared(x: torch.Tensor) -> torch.Tensor:
    """A real function of real and complex values."""
    return x.abs().square() if x.is_complex() else x.square()


# Redistribution


@pytest.mark.parametrize("processes", [None, "first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.int64])
def test_a_redistributed_field_is_the_same_field(dtype: torch.dtype, processes: str | None, mesh: Mesh) -> None:
    given = {None: None, "first": (mesh.size, 1, 1), "last": (1, 1, mesh.size)}[processes]
    whole = (10 * random(2, 5, 6, 7, 3)).to(dtype)
    source, target = GridPartition(mesh, (5, 6, 7)), GridPartition(mesh, (5, 6, 7), processes=given)
    there = redistribute(block(source, whole), source, target)
    assert torch.equal(there, block(target, whole))
    assert torch.equal(redistribute(there, target, source), block(source, whole))


def test_a_redistribution_reaches_blocks_of_any_sizes(mesh: Mesh) -> None:
    rows = [1] * (mesh.size - 1) + [9 - mesh.size + 1]
    source, target = GridPartition(mesh, (9, 8)), GridPartition(mesh, (9, 8), ownership=[rows, [8]])
    whole = random(9, 8, 2)
    assert torch.equal(redistribute(block(source, whole), source, target), block(target, whole))


def test_a_redistribution_to_the_same_blocks_is_no_copy(mesh: Mesh) -> None:
    source, same = GridPartition(mesh, (9, 8)), GridPartition(mesh, (9, 8), channels=3)
    local = random(*source.local_shape)
    assert redistribute(local, source, same) is local


def test_a_redistribution_between_different_grids_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"redistribute: from \(9, 8\) on \d ranks to \(8, 9\) on \d ranks"):
        redistribute(torch.ones(1), GridPartition(mesh, (9, 8)), GridPartition(mesh, (8, 9)))


def test_a_block_of_another_shape_is_refused(mesh: Mesh) -> None:
    source = GridPartition(mesh, (9, 8))
    with pytest.raises(ValueError, match=r"redistribute: got shape \(1, 1, 1\), this rank owns \["):
        redistribute(torch.ones(1, 1, 1), source, GridPartition(mesh, (9, 8), processes=(1, mesh.size)))


class Counting(MPI.Intracomm):
    """A communicator that notes the ranks to which it sends messages."""

    sent: ClassVar[list[int]] = []

    def Isend(self, buffer: Any, dest: int, *args: Any, **kwargs: Any) -> MPI.Request:
        Counting.sent.append(dest)
        return super().Isend(buffer, dest, *args, **kwargs)


def test_a_transform_of_slabs_sends_each_rank_one_message(mesh: Mesh, comm: MPI.Comm) -> None:
    assert isinstance(comm, MPI.Intracomm)
    grid = GridPartition(Counting(comm), (8, 10), processes=(mesh.size, 1))
    spectrum = SpectralPartition(grid)
    x = block(grid, random(8, 10, 3)).clone().requires_grad_()
    Counting.sent.clear()
    modes = rfft2(x, spectrum)
    assert len(Counting.sent) == mesh.size - 1
    torch.autograd.grad(modes.abs().sum(), x)
    assert len(Counting.sent) == 2 * (mesh.size - 1)


# Values


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_real_transform_is_that_of_the_whole_field(shape: tuple[int, ...], norm: Any, mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, shape))
    whole = random(2, *shape, 3)
    wanted = torch.fft.rfftn(whole, dim=axes(spectrum), norm=norm)
    found = rfftn(block(spectrum.grid, whole), spectrum, norm)
    assert distance(found, block(spectrum.blocks, wanted)) <= 1e-12
    assert distance(irfftn(found, spectrum, norm), block(spectrum.grid, whole)) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_complex_transform_is_that_of_the_whole_field(shape: tuple[int, ...], mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, shape), half=False)
    whole = complex_field(2, *shape, 3)
    wanted = torch.fft.fftn(whole, dim=axes(spectrum))
    found = fftn(block(spectrum.grid, whole), spectrum)
    assert distance(found, block(spectrum.blocks, wanted)) <= 1e-12
    assert distance(ifftn(found, spectrum), block(spectrum.grid, whole)) <= 1e-12


def test_transforms_of_two_axes_are_those_of_torch(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (7, 10))
    half, full = SpectralPartition(grid), SpectralPartition(grid, half=False)
    whole, dim = random(7, 10, 2), (-3, -2)
    local = block(grid, whole)
    assert distance(rfft2(local, half), block(half.blocks, torch.fft.rfft2(whole, dim=dim))) <= 1e-12
    assert distance(fft2(local, full), block(full.blocks, torch.fft.fft2(whole, dim=dim))) <= 1e-12
    spectral = complex_field(7, 10, 2)
    wanted = torch.fft.ifft2(spectral, dim=dim)
    assert distance(ifft2(block(full.blocks, spectral), full), block(grid, wanted)) <= 1e-12
    # A half spectrum that is not that of a real field: torch ignores what no real field has, and so do the ranks.
    wanted = torch.fft.irfft2(spectral[:, :6], s=(7, 10), dim=dim)
    assert distance(irfft2(block(half.blocks, spectral[:, :6]), half), block(grid, wanted)) <= 1e-12


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("shape", mpi4py_fft.SHAPES, ids=str)
def test_a_transform_is_that_of_mpi4py_fft(shape: tuple[int, ...], kind: str, mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, shape), half=kind == "real")
    x = torch.from_numpy(mpi4py_fft.field(shape, kind)).unsqueeze(-1)
    wanted = torch.from_numpy(mpi4py_fft.spectrum(shape, kind)).unsqueeze(-1)
    found = (rfftn if kind == "real" else fftn)(block(spectrum.grid, x), spectrum)
    assert distance(found, block(spectrum.blocks, wanted)) <= 1e-13


@pytest.mark.parametrize("half", [True, False])
def test_a_batch_without_a_field_has_an_empty_transform_and_gradient(half: bool, mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (8, 10), 2), half)
    there, back = (rfft2, irfft2) if half else (fft2, ifft2)
    x = torch.zeros(3, 0, *spectrum.grid.local_shape, dtype=torch.float64, requires_grad=True)
    spectral = there(x, spectrum)
    assert spectral.shape == (3, 0, *spectrum.local_shape)
    found = back(spectral, spectrum)
    assert found.shape == x.shape
    found.abs().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_a_transform_keeps_single_precision(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (8, 10)))
    whole = random(8, 10, 1, dtype=torch.float32)
    found = rfft2(block(spectrum.grid, whole), spectrum)
    assert distance(found, block(spectrum.blocks, torch.fft.rfft2(whole, dim=(-3, -2)))) <= 1e-6
    assert irfft2(found, spectrum).dtype == torch.float32


@pytest.mark.parametrize("processes", ["rows", "columns"])
def test_a_transform_does_not_depend_on_the_blocks_of_the_grid(processes: str, mesh: Mesh) -> None:
    given = (mesh.size, 1) if processes == "rows" else (1, mesh.size)
    whole = random(9, 8, 2)
    of_blocks = SpectralPartition(GridPartition(mesh, (9, 8)))
    of_slabs = SpectralPartition(GridPartition(mesh, (9, 8), processes=given))
    found = rfft2(block(of_slabs.grid, whole), of_slabs)
    assert torch.equal(found, rfft2(block(of_blocks.grid, whole), of_blocks))


def test_a_transform_does_not_depend_on_the_number_of_ranks(mesh: Mesh) -> None:
    whole = random(8, 12, 2)
    together = SpectralPartition(GridPartition(mesh, (8, 12)))
    alone = SpectralPartition(GridPartition(MPI.COMM_SELF, (8, 12)))
    wanted = block(together.blocks, rfft2(whole, alone))
    assert distance(rfft2(block(together.grid, whole), together), wanted) <= 1e-15


# Derivatives


def assert_same_as_whole(spectrum: SpectralPartition, leading: tuple[int, ...] = (), channels: int = 2) -> None:
    """Values and gradients of a transform and its inverse are those of torch.fft on the whole field."""
    shape, dim = spectrum.grid.shape, axes(spectrum)
    whole = (random if spectrum.half else complex_field)(*leading, *shape, channels)
    weight = random(*spectrum.shape, channels, seed=5) + 2
    alone = whole.clone().requires_grad_()
    wanted = (torch.fft.rfftn if spectrum.half else torch.fft.fftn)(alone, dim=dim)
    back = (torch.fft.irfftn if spectrum.half else torch.fft.ifftn)(weight * wanted, s=shape, dim=dim)
    (gradient,) = torch.autograd.grad((weight * wanted.abs().square()).sum() + squared(back).square().sum(), alone)
    local, own = block(spectrum.grid, whole).clone().requires_grad_(), block(spectrum.blocks, weight)
    found = (rfftn if spectrum.half else fftn)(local, spectrum)
    assert distance(found.detach(), block(spectrum.blocks, wanted.detach())) <= 1e-12
    restored = (irfftn if spectrum.half else ifftn)(own * found, spectrum)
    assert distance(restored.detach(), block(spectrum.grid, back.detach())) <= 1e-12
    (mine,) = torch.autograd.grad((own * found.abs().square()).sum() + squared(restored).square().sum(), local)
    assert distance(mine, block(spectrum.grid, gradient)) <= 1e-12


def assert_transposed(spectrum: SpectralPartition, *leading: int) -> None:
    """The products <y, F x> = <F^T y, x> of a real transform and its inverse agree, summed over the ranks."""
    comm, shape = spectrum.comm, spectrum.grid.shape
    x = block(spectrum.grid, positive(*leading, *shape, 2, seed=1)).clone().requires_grad_()
    parts = (positive(*leading, *spectrum.shape, 2, seed=seed) for seed in (2, 3))
    y = block(spectrum.blocks, torch.complex(*parts))
    modes = rfftn(x, spectrum)
    (pulled,) = torch.autograd.grad(modes, x, y)
    pairs = torch.view_as_real(y), torch.view_as_real(modes.detach())
    assert inner(comm, (pulled, x.detach())) == pytest.approx(inner(comm, pairs), rel=1e-12)
    s = y.clone().requires_grad_()
    field = irfftn(s, spectrum)
    (pulled,) = torch.autograd.grad(field, s, x.detach())
    pairs = torch.view_as_real(pulled), torch.view_as_real(y)
    assert inner(comm, pairs) == pytest.approx(inner(comm, (x.detach(), field.detach())), rel=1e-12)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("shape", [(8, 10), (7, 9), (4, 5, 6)], ids=str)
def test_gradients_are_those_of_the_whole_field(shape: tuple[int, ...], half: bool, mesh: Mesh) -> None:
    assert_same_as_whole(SpectralPartition(GridPartition(mesh, shape), half))


@pytest.mark.parametrize("shape", [(8, 10), (7, 9)], ids=str)
def test_the_adjoint_of_a_transform_is_its_transpose(shape: tuple[int, ...], mesh: Mesh) -> None:
    assert_transposed(SpectralPartition(GridPartition(mesh, shape)))


@pytest.mark.parametrize("shape", [(10,), (7, 10)], ids=str)
def test_functional_transforms_of_torch_pass_through(shape: tuple[int, ...], mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, shape))
    axes = list(range(-len(shape) - 1, -1))
    whole, tangent = random(*shape, 2), random(*shape, 2, seed=2)
    local, along = block(spectrum.grid, whole).contiguous(), block(spectrum.grid, tangent).contiguous()
    wanted = block(spectrum.blocks, torch.fft.rfftn(tangent, dim=axes))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(rfftn(forward_ad.make_dual(local, along), spectrum)).tangent
        assert dual is not None
        assert distance(dual, wanted) <= 1e-12
    by_func = torch.func.jvp(lambda x: rfftn(x, spectrum), (local,), (along,))[1]
    assert distance(by_func, wanted) <= 1e-12
    batch = torch.func.vmap(lambda x: rfftn(x, spectrum))(torch.stack([local, along]))
    assert distance(batch[1], wanted) <= 1e-12
    pulled = torch.func.grad(lambda x: rfftn(x, spectrum).abs().square().sum())(local)
    alone = torch.func.grad(lambda x: torch.fft.rfftn(x, dim=axes).abs().square().sum())(whole)
    assert distance(pulled, block(spectrum.grid, alone)) <= 1e-12


def test_second_derivatives_are_those_of_the_whole_field(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (6, 7)))
    whole, weight = random(6, 7, 1), random(6, 7, 1, seed=3)

    def twice(x: torch.Tensor, weight: torch.Tensor, energy: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        return torch.autograd.grad((weight * first).sum(), x)[0]

    wanted = twice(whole, weight, lambda x: torch.fft.rfft2(x, dim=(-3, -2)).abs().pow(4))
    found = twice(block(spectrum.grid, whole), block(spectrum.grid, weight), lambda x: rfft2(x, spectrum).abs().pow(4))
    assert distance(found, block(spectrum.grid, wanted)) <= 1e-12


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges")
@pytest.mark.parametrize("kind", ["redistribute", "transform", "layer"])
def test_a_compiled_transform_is_one_graph_with_the_same_gradients(kind: str, mesh: Mesh) -> None:
    grid = GridPartition(mesh, (11, 9), channels=2)
    columns = GridPartition(mesh, (11, 9), processes=(1, mesh.size))
    spectrum = SpectralPartition(grid)
    torch.manual_seed(0)
    functions: dict[str, Field] = {
        "redistribute": lambda x: redistribute(x.sin(), grid, columns),
        "transform": lambda x: irfft2(rfft2(x.sin(), spectrum).square(), spectrum),
        "layer": SpectralConv2d(grid, 2, 3, (3, 4), dtype=torch.float64),
    }
    assert_same_when_compiled(functions[kind], block(grid, random(3, 11, 9, 2)).clone())


# Wave numbers


def test_spectral_derivatives_of_a_wave_are_exact(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (12, 10))
    spectrum = SpectralPartition(grid)
    lengths = (3.0, 5.0)
    y, x = (torch.arange(n, dtype=torch.float64) * length / n for n, length in zip(grid.shape, lengths, strict=True))
    ky, kx = 2 * 2 * math.pi / 3.0, -3 * 2 * math.pi / 5.0
    phase = (ky * y[:, None] + kx * x + 0.3).unsqueeze(-1)
    modes = rfft2(block(grid, phase.sin()), spectrum)
    for number, k in zip(spectrum.wavenumbers(lengths), (ky, kx), strict=True):
        found = irfft2(1j * number * modes, spectrum)
        assert distance(found, block(grid, k * phase.cos())) <= 1e-12


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("shape", [(8, 12), (9, 7), (4, 5, 6)], ids=str)
def test_masks_and_filters_are_those_of_the_whole_spectrum(shape: tuple[int, ...], half: bool, mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, shape), half)
    modes = [list(range((n + 1) // 2)) + list(range(-(n // 2), 0)) for n in shape]
    if half:
        modes[-1] = list(range(shape[-1] // 2 + 1))
    whole = torch.meshgrid(*[torch.tensor(m, dtype=torch.float64) for m in modes], indexing="ij")
    mask, damping = torch.ones(*spectrum.shape, 1), torch.ones(*spectrum.shape, 1, dtype=torch.float64)
    for m, n in zip(whole, shape, strict=True):
        mask *= (3 * m.abs() < n).unsqueeze(-1)
        damping *= torch.exp(-20 * (2 * m.abs() / n) ** 8).unsqueeze(-1)
    assert torch.equal(spectrum.dealias().float(), block(spectrum.blocks, mask))
    assert distance(spectrum.exponential_filter(8, 20.0), block(spectrum.blocks, damping)) <= 1e-14


def test_a_spectrum_is_scattered_and_gathered(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (5, 9), channels=2))
    whole = complex_field(3, *spectrum.global_shape)
    local = spectrum.scatter(whole)
    assert torch.equal(local, block(spectrum.blocks, whole))
    found, also = spectrum.gather(local), gather(local, spectrum)
    if mesh.rank == 0:
        assert found is not None
        assert torch.equal(found, whole)
        assert torch.equal(also, whole)


# In an equation, and as a layer


class Vorticity(torch.nn.Module):
    """The equation of two-dimensional incompressible flow, dealiased, with a learnt viscosity."""

    def __init__(self, forward: Field, inverse: Field, numbers: tuple[torch.Tensor, ...], mask: torch.Tensor) -> None:
        super().__init__()
        self.forward_transform, self.inverse, self.numbers, self.mask = forward, inverse, numbers, mask
        self.viscosity = torch.nn.Parameter(torch.tensor(0.05, dtype=torch.float64))

    def forward(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ky, kx = self.numbers
        square = kx**2 + ky**2
        modes = self.mask * self.forward_transform(w)
        stream = modes / square.where(square > 0, 1.0)
        u, v = self.inverse(1j * ky * stream), self.inverse(-1j * kx * stream)
        along = u * self.inverse(1j * kx * modes) + v * self.inverse(1j * ky * modes)
        return -self.inverse(self.mask * self.forward_transform(along) + self.viscosity * square * modes)


@pytest.mark.parametrize(
    "trajectory",
    [Trajectory(ram="1MiB", keep="graph"), Trajectory(ram_slots=1, keep="solution", schedule="revolve")],
    ids=["graphs", "one checkpoint"],
)
def test_a_spectral_equation_has_the_solution_and_gradients_of_torch(trajectory: Trajectory, mesh: Mesh) -> None:
    grid, single = GridPartition(mesh, (8, 9)), SpectralPartition(GridPartition(MPI.COMM_SELF, (8, 9)))
    spectrum, dim, times = SpectralPartition(grid), (-3, -2), [0.0, 0.2, 0.3]
    whole = random(8, 9, 1)
    own = Vorticity(
        lambda w: rfft2(w, spectrum), lambda s: irfft2(s, spectrum), spectrum.wavenumbers(), spectrum.dealias()
    )
    every = Vorticity(
        lambda w: torch.fft.rfft2(w, dim=dim),
        lambda s: torch.fft.irfft2(s, s=(8, 9), dim=dim),
        single.wavenumbers(),
        single.dealias(),
    )
    start, alone = block(grid, whole).clone().requires_grad_(), whole.clone().requires_grad_()
    found = NeuralODE(own, step_size=0.1, partition=grid, trajectory=trajectory)(start, times)
    wanted = odeint_plain(every, alone, times, TABLEAUX["4"], 0.1)
    assert distance(found.detach(), block(grid, wanted.detach())) <= 1e-12
    mine = torch.autograd.grad(found.pow(3).sum(), [start, own.viscosity])
    theirs = torch.autograd.grad(wanted.pow(3).sum(), [alone, every.viscosity])
    assert distance(mine[0], block(grid, theirs[0])) <= 1e-12
    assert distance(mesh.sum(mine[1]), theirs[1]) <= 1e-12


def operator(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The Fourier layer of the authors on a whole field, one mode after the other."""
    modes = torch.fft.rfft2(x, dim=(-3, -2))
    out = modes.new_zeros(*modes.shape[:-1], weight.shape[2])
    rows = weight.shape[3]
    for half, row, column in torch.cartesian_prod(*map(torch.arange, (2, rows, weight.shape[4]))).tolist():
        y = row - half * rows
        out[..., y, column, :] = modes[..., y, column, :] @ weight[half, :, :, row, column]
    return torch.fft.irfft2(out, s=x.shape[-3:-1], dim=(-3, -2))


@pytest.mark.parametrize(
    ("shape", "modes"), [((8, 10), (2, 3)), ((9, 7), (4, 4)), ((8, 8), (4, 1))], ids=["few", "odd", "one column"]
)
def test_a_fourier_layer_is_that_of_the_whole_field(shape: tuple[int, int], modes: tuple[int, int], mesh: Mesh) -> None:
    torch.manual_seed(0)
    grid = GridPartition(mesh, shape, channels=2)
    layer = SpectralConv2d(grid, 2, 3, modes, dtype=torch.float64)
    whole = random(2, *shape, 2)
    weight = layer.weight.detach().clone().requires_grad_()
    alone, local = whole.clone().requires_grad_(), block(grid, whole).clone().requires_grad_()
    wanted, found = operator(alone, weight), layer(local)
    assert distance(found, block(grid, wanted)) <= 1e-12
    theirs = torch.autograd.grad(wanted.pow(3).sum(), [alone, weight])
    mine = torch.autograd.grad(found.pow(3).sum(), [local, layer.weight])
    assert distance(mine[0], block(grid, theirs[0])) <= 1e-12
    assert distance(mesh.sum(torch.view_as_real(mine[1])), torch.view_as_real(theirs[1])) <= 1e-12


def test_parallel_sums_the_gradients_of_a_fourier_layer(mesh: Mesh) -> None:
    torch.manual_seed(0)
    grid = GridPartition(mesh, (8, 10), channels=1)
    layer = SpectralConv2d(grid, 1, 1, 3, dtype=torch.float64)
    whole = random(8, 10, 1)
    weight = layer.weight.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(operator(whole, weight).pow(3).sum(), weight)
    wrapped = parallel(layer, mesh)
    wrapped(block(grid, whole)).pow(3).sum().backward()
    assert layer.weight.grad is not None
    assert distance(layer.weight.grad, wanted) <= 1e-12


# What is refused


def test_grids_smaller_than_the_number_of_ranks_are_refused(mesh: Mesh) -> None:
    ranks = mesh.size
    along_y = GridPartition(mesh, (2 * ranks, 2 * ranks - 3 if ranks > 1 else 1), processes=(ranks, 1))
    if ranks > 1:
        with pytest.raises(
            ConfigurationError, match=f"wave numbers along x: must have at least one of both .* {ranks}"
        ):
            SpectralPartition(along_y)
        few_rows = GridPartition(mesh, (ranks - 1, 4 * ranks), processes=(1, ranks))
        with pytest.raises(ConfigurationError, match=f"spectrum: .* has {ranks - 1} points along y"):
            SpectralPartition(few_rows)
    else:
        assert SpectralPartition(along_y).shape == (2, 1)


def test_wrong_arguments_are_one_line(mesh: Mesh) -> None:
    grid, cube = GridPartition(mesh, (8, 9)), GridPartition(mesh, (4, 5, 6))
    half, full, solid = SpectralPartition(grid), SpectralPartition(grid, half=False), SpectralPartition(cube)
    x = torch.ones(grid.local_shape)
    wrong: dict[str, Callable[[], object]] = {
        r"spectrum: processes = \(1, 1\): is for grids of three axes": lambda: SpectralPartition(grid, True, (1, 1)),
        "rfft2: spectrum has half = False: must be True": lambda: rfft2(x, full),
        "fftn: spectrum has half = True: must be False": lambda: fftn(x, half),
        r"irfft2: spectrum of shape \(4, 5, 4\): must have 2 axes": lambda: irfft2(x, solid),
        "dealias: fraction = 0: must be above 0": lambda: half.dealias(0),
        "exponential_filter: order = 0": lambda: half.exponential_filter(0),
        r"wavenumbers: lengths = \(1.0,\): must be positive": lambda: half.wavenumbers((1.0,)),
        r"modes = \(5, 2\): must be from \(1, 1\) to \(4, 5\)": lambda: SpectralConv2d(grid, 1, 1, (5, 2)),
        "SpectralConv2d: is for grids of 2 axes": lambda: SpectralConv2d(cube, 1, 1, 1),
    }
    for message, call in wrong.items():
        with pytest.raises(ConfigurationError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="irfft2: got shape"):
        irfft2(torch.ones(1, 1, 1, dtype=torch.complex64), half)
