"""Fourier transforms of three axes on pencils are those of torch.fft; messages stay in rows and columns."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh, SpectralPartition
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import fftn, irfftn, rfftn
from pnode_dist.nn import SpectralConv3d
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.grids import block
from tests.mpi.test_compiled_exchange import assert_same_when_compiled
from tests.mpi.test_fft import (
    Counting,
    assert_same_as_whole,
    assert_transposed,
)
from tests.oracles import mpi4py_fft
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

SIZE = MPI.COMM_WORLD.size
# Every way to write the number of ranks as rows times columns.
PROCESSES = [(p, SIZE // p) for p in range(1, SIZE + 1) if SIZE % p == 0]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("processes", PROCESSES, ids=str)
def test_values_and_gradients_are_those_of_the_whole_field(processes: tuple[int, int], half: bool, mesh: Mesh) -> None:
    grid = GridPartition(mesh, (5, 4, 7))
    assert_same_as_whole(SpectralPartition(grid, half, processes))


@pytest.mark.parametrize("processes", PROCESSES, ids=str)
def test_the_adjoint_of_a_transform_is_its_transpose(processes: tuple[int, int], mesh: Mesh) -> None:
    assert_transposed(SpectralPartition(GridPartition(mesh, (4, 5, 8)), processes=processes))


@pytest.mark.parametrize("processes", PROCESSES, ids=str)
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_a_transform_is_that_of_mpi4py_fft(kind: str, processes: tuple[int, int], mesh: Mesh) -> None:
    shape = (5, 4, 7)
    assert shape in mpi4py_fft.SHAPES
    spectrum = SpectralPartition(GridPartition(mesh, shape), kind == "real", processes)
    x = torch.from_numpy(mpi4py_fft.field(shape, kind)).unsqueeze(-1)
    wanted = torch.from_numpy(mpi4py_fft.spectrum(shape, kind)).unsqueeze(-1)
    found = (rfftn if kind == "real" else fftn)(block(spectrum.grid, x), spectrum)
    assert distance(found, block(spectrum.blocks, wanted)) <= 1e-13


def test_more_ranks_than_planes_share_the_most_even_pencils(mesh: Mesh) -> None:
    spectrum = SpectralPartition(GridPartition(mesh, (2, 4, 7)))
    assert spectrum.processes == {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2)}[mesh.size]
    assert_same_as_whole(spectrum, leading=(2,))


def test_pencils_that_are_given_keep_their_uneven_sizes(mesh: Mesh) -> None:
    rows, columns = PROCESSES[len(PROCESSES) // 2]
    first, second = [1] * (rows - 1) + [7 - rows], [1] * (columns - 1) + [6 - columns]
    grid = GridPartition(mesh, (6, 5, 8), ownership=[first, second, [8]])
    spectrum = SpectralPartition(grid, processes=(rows, columns))
    assert spectrum.stages[0].before is grid
    assert_same_as_whole(spectrum)


@pytest.mark.parametrize("processes", PROCESSES, ids=str)
def test_messages_stay_in_a_row_and_then_in_a_column_of_ranks(processes: tuple[int, int], mesh: Mesh) -> None:
    assert isinstance(mesh.state_comm, MPI.Intracomm)
    rows, columns = processes
    grid = GridPartition(Counting(mesh.state_comm), (6, 6, 10), processes=(rows, columns, 1))
    spectrum = SpectralPartition(grid, processes=processes)
    x = block(grid, random(6, 6, 10, 2)).clone().requires_grad_()
    row = [rank for rank in range(mesh.size) if rank // columns == mesh.rank // columns and rank != mesh.rank]
    column = [rank for rank in range(mesh.size) if rank % columns == mesh.rank % columns and rank != mesh.rank]
    Counting.sent.clear()
    modes = rfftn(x, spectrum)
    assert Counting.sent == row + column
    Counting.sent.clear()
    torch.autograd.grad(modes.abs().sum(), x)
    assert Counting.sent == column + row
    Counting.sent.clear()
    irfftn(modes.detach(), spectrum)
    assert Counting.sent == column + row


@pytest.mark.parametrize("processes", PROCESSES, ids=str)
def test_wave_numbers_and_masks_are_those_of_the_blocks(processes: tuple[int, int], mesh: Mesh) -> None:
    grid = GridPartition(mesh, (4, 5, 8))
    spectrum = SpectralPartition(grid, processes=processes)
    whole = SpectralPartition(GridPartition(MPI.COMM_SELF, grid.shape))
    for own, every in zip(spectrum.wavenumbers(), whole.wavenumbers(), strict=True):
        every = every.expand(*whole.shape, 1)
        assert torch.equal(own.expand(*spectrum.local_shape[:-1], 1), block(spectrum.blocks, every))
    assert torch.equal(spectrum.dealias(), block(spectrum.blocks, whole.dealias()))


def operator(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The Fourier layer of the authors on a whole field of three axes: `weights1` to `weights4` of their program."""
    first, second, last = weight.shape[-3:]
    modes = torch.fft.rfftn(x, dim=(-4, -3, -2))
    out = modes.new_zeros(*modes.shape[:-1], weight.shape[2])
    corners = [
        (slice(0, first), slice(0, second)),
        (slice(-first, None), slice(0, second)),
        (slice(0, first), slice(-second, None)),
        (slice(-first, None), slice(-second, None)),
    ]
    for corner, (z, y) in zip(weight, corners, strict=True):
        mixed = torch.einsum("bzyxi,iozyx->bzyxo", modes[:, z, y, :last], corner)
        out[:, z, y, :last] = mixed
    return torch.fft.irfftn(out, s=x.shape[-4:-1], dim=(-4, -3, -2))


@pytest.mark.parametrize("planes", [5, 2])
def test_a_fourier_layer_is_that_of_the_whole_field(planes: int, mesh: Mesh) -> None:
    torch.manual_seed(0)
    grid = GridPartition(mesh, (planes, 6, 8), channels=2)
    layer = SpectralConv3d(grid, 2, 3, (planes // 2, 2, 3), dtype=torch.float64)
    whole = random(2, planes, 6, 8, 2)
    weight = layer.weight.detach().clone().requires_grad_()
    alone, local = whole.clone().requires_grad_(), block(grid, whole).clone().requires_grad_()
    wanted, found = operator(alone, weight), layer(local)
    assert distance(found.detach(), block(grid, wanted.detach())) <= 1e-12
    theirs = torch.autograd.grad(wanted.pow(3).sum(), [alone, weight])
    mine = torch.autograd.grad(found.pow(3).sum(), [local, layer.weight])
    assert distance(mine[0], block(grid, theirs[0])) <= 1e-12
    assert distance(mesh.sum(torch.view_as_real(mine[1])), torch.view_as_real(theirs[1])) <= 1e-12


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges")
def test_compiled_pencils_are_one_graph_with_the_same_gradients(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (2, 4, 7), channels=2)
    spectrum = SpectralPartition(grid)
    x = block(grid, random(3, 2, 4, 7, 2)).clone()
    assert_same_when_compiled(lambda x: irfftn(rfftn(x.sin(), spectrum).square(), spectrum), x)


def test_pencils_that_do_not_fit_are_one_line(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (4, 5, 6))
    for processes in [(mesh.size, 2), (mesh.size,), (0, 0), (1.0, mesh.size)]:
        with pytest.raises(ConfigurationError, match=rf"spectrum: processes = .* to {mesh.size} ranks") as caught:
            SpectralPartition(grid, processes=processes)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    if mesh.size == 4:
        long = GridPartition(mesh, (1, 3, 40))
        with pytest.raises(ConfigurationError, match=r"divided into pencils for 4 ranks: .* p <= 1 and q <= 3"):
            SpectralPartition(long)
        with pytest.raises(ConfigurationError, match="the first at most 1 and the second at most 3"):
            SpectralPartition(long, processes=(2, 2))
