"""Exchanges between ranks: what they bring, and that their adjoints are their transposes."""

from itertools import product

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist import BatchPartition, GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import gather, global_sum, halo, scatter
from tests.mpi.grids import block
from tests.oracles.fields import padded
from tests.oracles.right_hand_sides import random

pytestmark = pytest.mark.mpi

RULES = ("periodic", "replicate", "zero")
SHAPES = [(7, 9), (13, 8)]


def positive(*shape: int, seed: int) -> torch.Tensor:
    """Numbers in [0.5, 1.5]: inner products of such do not cancel."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def inner(comm: MPI.Comm, *pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The inner product over all ranks."""
    total: float = comm.allreduce(float(sum((a * b).sum() for a, b in pairs)))
    return total


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_a_halo_is_the_padding_of_the_whole_field(
    boundary: tuple[str, str], shape: tuple[int, int], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, shape, channels=2, boundary=boundary, stencil_width=3)
    whole = random(*shape, 2)
    local = block(partition, whole)
    for width in (0, 1, 2, 3, (1, 2), (3, 0), (0, 2), None):
        wy, wx = (3, 3) if width is None else (width, width) if isinstance(width, int) else width
        found = halo(local, partition, width)
        wanted = block(partition, padded(whole, boundary, (wy, wx)), (wy, wx))
        assert torch.equal(found, wanted), width


@pytest.mark.parametrize("split", ["rows", "columns"])
@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_a_halo_is_the_padding_when_only_one_axis_is_split(boundary: tuple[str, str], split: str, mesh: Mesh) -> None:
    processes = (mesh.size, 1) if split == "rows" else (1, mesh.size)
    partition = GridPartition(mesh, (9, 10), boundary=boundary, stencil_width=2, processes=processes)
    whole = random(9, 10, 1)
    wanted = block(partition, padded(whole, boundary, (2, 2)), (2, 2))
    assert torch.equal(halo(block(partition, whole), partition), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,)])
def test_a_halo_takes_any_batch_axes_channels_and_float_type(
    leading: tuple[int, ...], dtype: torch.dtype, mesh: Mesh
) -> None:
    boundary = ("replicate", "periodic")
    partition = GridPartition(mesh, (7, 9), channels=1, boundary=boundary, stencil_width=2)
    whole = random(*leading, 7, 9, 5, dtype=dtype)
    found = halo(block(partition, whole), partition)
    assert found.dtype == dtype
    assert torch.equal(found, block(partition, padded(whole, boundary, (2, 2)), (2, 2)))


def test_a_halo_takes_a_field_of_any_layout_in_memory(mesh: Mesh) -> None:
    boundary = ("zero", "periodic")
    partition = GridPartition(mesh, (7, 9), boundary=boundary)
    whole = random(2, 7, 9, 3)
    wanted = block(partition, padded(whole, boundary, (1, 1)), (1, 1))
    channels_first = block(partition, whole).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(halo(channels_first, partition), wanted)
    assert torch.equal(halo(block(partition, whole.expand(2, 7, 9, 3)), partition), wanted)


@pytest.mark.parametrize("width", [1, 2])
def test_a_periodic_halo_is_petsc_s_own(width: int, mesh: Mesh, comm: MPI.Comm) -> None:
    partition = GridPartition(mesh, (7, 9), channels=2, boundary=("periodic", "periodic"), stencil_width=width)
    lengths: list[list[int]] = [[], []]
    for (y0, y1), (x0, x1) in comm.allgather(partition.owned):
        if x0 == 0:
            lengths[1].append(y1 - y0)
        if y0 == 0:
            lengths[0].append(x1 - x0)
    grid = PETSc.DMDA().create(
        dim=2,
        dof=2,
        sizes=(9, 7),
        proc_sizes=(partition.processes[1], partition.processes[0]),
        boundary_type=(PETSc.DM.BoundaryType.PERIODIC,) * 2,
        stencil_type=PETSc.DMDA.StencilType.BOX,
        stencil_width=width,
        ownership_ranges=lengths,
        comm=comm,
    )
    (x0, x1), (y0, y1) = grid.getRanges()
    assert partition.owned == ((y0, y1), (x0, x1))
    local = block(partition, random(7, 9, 2))
    inside, around = grid.createGlobalVec(), grid.createLocalVec()
    inside.setArray(local.numpy())
    grid.globalToLocal(inside, around)
    wanted = around.getArray().reshape(y1 - y0 + 2 * width, x1 - x0 + 2 * width, 2)
    assert np.array_equal(halo(local, partition).numpy(), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_the_adjoint_of_a_halo_is_its_transpose(
    boundary: tuple[str, str], shape: tuple[int, int], mesh: Mesh, comm: MPI.Comm
) -> None:
    partition = GridPartition(mesh, shape, boundary=boundary, stencil_width=3)
    for width in ((1, 1), (3, 3), (1, 3), (2, 0)):
        x = block(partition, positive(2, *shape, 2, seed=1)).clone().requires_grad_()
        y = block(partition, positive(2, shape[0] + 2 * width[0], shape[1] + 2 * width[1], 2, seed=2), width)
        y = y * (1 + 0.1 * comm.rank)
        image = halo(x, partition, width)
        (pulled_back,) = torch.autograd.grad(image, x, y)
        assert inner(comm, (pulled_back, x.detach())) == pytest.approx(inner(comm, (y, image.detach())), rel=1e-13)


@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_the_adjoint_of_a_halo_is_that_of_padding_the_whole_field(boundary: tuple[str, str], mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9), channels=2, boundary=boundary, stencil_width=2)
    whole = random(7, 9, 2).requires_grad_()
    weights = [random(*block(partition, padded(whole, boundary, (2, 2)), (2, 2)).shape, seed=partition.comm.rank)]
    shapes = partition.comm.allgather((partition.owned, tuple(weights[0].shape)))
    around = padded(whole, boundary, (2, 2))
    loss = torch.zeros((), dtype=torch.float64)
    for rank, (((y0, y1), (x0, x1)), shape) in enumerate(shapes):
        loss = loss + (random(*shape, seed=rank) * around[y0 : y1 + 4, x0 : x1 + 4]).sum()
    (wanted,) = torch.autograd.grad(loss, whole)
    local = block(partition, whole.detach()).clone().requires_grad_()
    (found,) = torch.autograd.grad((halo(local, partition) * weights[0]).sum(), local)
    torch.testing.assert_close(found, block(partition, wanted), rtol=1e-13, atol=1e-14)


def test_a_halo_of_a_halo_has_a_second_derivative(mesh: Mesh, comm: MPI.Comm) -> None:
    boundary = ("replicate", "periodic")
    partition = GridPartition(mesh, (7, 9), boundary=boundary)
    whole = random(7, 9, 1).requires_grad_()
    (first,) = torch.autograd.grad((padded(whole, boundary, (1, 1)) ** 3).sum(), whole, create_graph=True)
    (wanted,) = torch.autograd.grad((first**2).sum(), whole)
    # Each rank's share: its own points, seen through its halo, weighted as often as all ranks see them together.
    local = block(partition, whole.detach()).clone().requires_grad_()
    around = halo(local, partition)
    times_seen = block(partition, seen_once(partition), (1, 1))
    (own,) = torch.autograd.grad((times_seen * around**3).sum(), local, create_graph=True)
    (found,) = torch.autograd.grad((own**2).sum(), local)
    torch.testing.assert_close(found, block(partition, wanted), rtol=1e-12, atol=1e-13)


def seen_once(partition: GridPartition) -> torch.Tensor:
    """For every point of the padded field, one over the number of ranks that see it."""
    ny, nx = partition.shape
    seen = torch.zeros(ny + 2, nx + 2, 1, dtype=torch.float64)
    for (y0, y1), (x0, x1) in partition.comm.allgather(partition.owned):
        seen[y0 : y1 + 2, x0 : x1 + 2] += 1
    return 1 / seen


def test_a_halo_wider_than_a_block_is_refused_on_all_ranks(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9), boundary=("periodic", "zero"))
    with pytest.raises(ConfigurationError, match=r"halo: width = \(8, 8\)"):
        halo(torch.zeros(partition.local_shape), partition, 8)
    with pytest.raises(ConfigurationError, match=r"halo: width = \(-1, -1\)"):
        halo(torch.zeros(partition.local_shape), partition, -1)


def test_a_halo_of_another_shape_is_refused(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (7, 9))
    ny, nx, _ = partition.local_shape
    for shape in ((ny + 1, nx, 1), (nx, 1), (ny,)):
        with pytest.raises(ValueError, match="halo: got shape") as caught:
            halo(torch.zeros(shape), partition)
        assert f"{ny}, {nx}" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_a_global_sum_is_the_sum_on_every_rank(shape: tuple[int, ...], dtype: torch.dtype, comm: MPI.Comm) -> None:
    parts = [
        random(*shape, seed=rank, dtype=dtype) if shape else torch.tensor(1.5 + rank, dtype=dtype)
        for rank in range(comm.size)
    ]
    found = global_sum(parts[comm.rank], comm)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.stack(parts).sum(0))
    assert len(set(comm.allgather(found.numpy().tobytes()))) == 1


def test_a_global_sum_leaves_its_argument_alone(comm: MPI.Comm) -> None:
    x = torch.ones(3)
    global_sum(x, comm)
    assert torch.equal(x, torch.ones(3))


def test_the_adjoint_of_a_global_sum_is_its_transpose(comm: MPI.Comm) -> None:
    x, y = positive(4, seed=comm.rank).requires_grad_(), positive(4, seed=50 + comm.rank)
    image = global_sum(x, comm)
    (pulled_back,) = torch.autograd.grad(image, x, y)
    assert inner(comm, (pulled_back, x.detach())) == pytest.approx(inner(comm, (y, image.detach())), rel=1e-13)


def test_the_variance_of_a_distributed_field_has_the_serial_gradient(mesh: Mesh, comm: MPI.Comm) -> None:
    partition = BatchPartition(mesh, 7, (2,))
    whole = random(7, 2).requires_grad_()
    (wanted,) = torch.autograd.grad(((whole - whole.mean()) ** 2).sum() / 14, whole)
    local = partition.scatter(whole).requires_grad_()
    mean = global_sum(local.sum(), comm) / 14
    (found,) = torch.autograd.grad(((local - mean) ** 2).sum() / 14, local)
    torch.testing.assert_close(found, partition.scatter(wanted), rtol=1e-13, atol=1e-15)


@pytest.fixture(params=["grid", "batch", "batch smaller than the ranks"])
def partition(request: pytest.FixtureRequest, mesh: Mesh) -> GridPartition | BatchPartition:
    if request.param == "grid":
        return GridPartition(mesh, (7, 9), channels=2)
    return BatchPartition(mesh, 7 if request.param == "batch" else 1, (3,))


@pytest.mark.parametrize("leading", [(), (2,)])
def test_the_adjoint_of_scatter_is_its_transpose(
    leading: tuple[int, ...], partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    root = comm.size - 1
    x = positive(*leading, *partition.global_shape, seed=3).requires_grad_()
    y = positive(*leading, *partition.local_shape, seed=comm.rank)
    image = scatter(x if comm.rank == root else None, partition, root=root)
    image.backward(y)
    at_root = [(x.grad, x.detach())] if x.grad is not None else []
    assert (x.grad is not None) == (comm.rank == root)
    assert inner(comm, *at_root) == pytest.approx(inner(comm, (y, image.detach())), rel=1e-13)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_the_adjoint_of_gather_is_its_transpose(
    leading: tuple[int, ...], partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    root = comm.size - 1
    x = positive(*leading, *partition.local_shape, seed=comm.rank).requires_grad_()
    image = gather(x, partition, root=root)
    y = positive(*leading, *partition.global_shape, seed=4)
    assert tuple(image.shape) == (tuple(y.shape) if comm.rank == root else (0,))
    image.backward(y if comm.rank == root else torch.empty(0, dtype=torch.float64))
    assert x.grad is not None
    at_root = [(y, image.detach())] if comm.rank == root else []
    assert inner(comm, (x.grad, x.detach())) == pytest.approx(inner(comm, *at_root), rel=1e-13)


def test_scatter_and_gather_are_inverse_and_so_are_their_adjoints(
    partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    whole = random(*partition.global_shape).requires_grad_()
    back = gather(scatter(whole if comm.rank == 0 else None, partition), partition)
    weight = random(*partition.global_shape, seed=8)
    share = (weight * back).sum() if comm.rank == 0 else back.sum()
    share.backward()
    if comm.rank == 0:
        assert torch.equal(back.detach(), whole.detach())
        assert whole.grad is not None
        assert torch.equal(whole.grad, weight)


def test_scattering_what_needs_no_gradient_needs_none(partition: GridPartition | BatchPartition) -> None:
    assert not scatter(random(*partition.global_shape), partition).requires_grad
