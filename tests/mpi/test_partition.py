"""Partitions at any number of ranks: who owns what, scatter and gather, views of Vecs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import BatchPartition, GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from tests.oracles.right_hand_sides import random

pytestmark = pytest.mark.mpi

Partition = BatchPartition | GridPartition


@pytest.fixture(
    params=[
        "grid 11x2",
        "grid 7x9x2",
        "grid 13x5x1",
        "grid 5x4x7x3",
        "batch 7",
        "batch 1",
        "batch 3 of nothing",
        "batch of numbers",
    ]
)
def partition(request: pytest.FixtureRequest, mesh: Mesh) -> Partition:
    make: dict[str, Callable[[], Partition]] = {
        "grid 11x2": lambda: GridPartition(mesh, (11,), channels=2, boundary="reflect"),
        "grid 5x4x7x3": lambda: GridPartition(mesh, (5, 4, 7), channels=3, boundary=("zero", "periodic", 1.0)),
        "grid 7x9x2": lambda: GridPartition(mesh, (7, 9), channels=2, boundary=("replicate", "periodic")),
        "grid 13x5x1": lambda: GridPartition(mesh, (13, 5), boundary=("zero", "zero"), stencil_width=0),
        "batch 7": lambda: BatchPartition(mesh, 7, (3, 2)),
        # At more than one rank somebody owns nothing.
        "batch 1": lambda: BatchPartition(mesh, 1, (4,)),
        "batch 3 of nothing": lambda: BatchPartition(mesh, 3, (0, 2)),
        "batch of numbers": lambda: BatchPartition(mesh, 5, ()),
    }
    return make[request.param]()


def owned(partition: Partition) -> tuple[slice, ...]:
    ranges: Any = partition.owned
    return tuple(slice(*r) for r in ranges) if isinstance(partition, GridPartition) else (slice(*ranges),)


def test_every_entry_has_one_owner(partition: Partition, comm: MPI.Comm) -> None:
    owners = np.zeros(partition.global_shape, dtype="i")
    owners[owned(partition)] = 1
    comm.Allreduce(MPI.IN_PLACE, owners)
    assert (owners == 1).all()
    assert partition.local_shape == np.empty(partition.global_shape)[owned(partition)].shape


def test_shares_differ_by_at_most_one(partition: Partition, comm: MPI.Comm) -> None:
    for axis in range(len(owned(partition))):
        lengths = comm.allgather(partition.local_shape[axis])
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("leading", [(), (2,), (3, 1)])
def test_gather_undoes_scatter(partition: Partition, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    root = partition.comm.size - 1
    whole = (10 * random(*leading, *partition.global_shape)).to(dtype)
    local = partition.scatter(whole if partition.comm.rank == root else None, root=root)
    assert local.dtype == dtype
    assert torch.equal(local, whole[(*[slice(None)] * len(leading), *owned(partition))])
    for back in {0, root}:
        gathered = partition.gather(local, root=back)
        assert (gathered is None) == (partition.comm.rank != back)
        assert gathered is None or torch.equal(gathered, whole)


def test_scatter_takes_numpy_arrays_and_any_layout(partition: Partition) -> None:
    whole = random(*partition.global_shape)
    from_numpy = partition.scatter(np.asfortranarray(whole.numpy()))
    reversed_axes = whole.permute(*reversed(range(whole.dim()))).contiguous().permute(*reversed(range(whole.dim())))
    assert torch.equal(partition.scatter(whole), from_numpy)
    assert torch.equal(partition.scatter(reversed_axes), from_numpy)


def test_gather_takes_a_tensor_of_any_layout(partition: Partition) -> None:
    whole = random(*partition.global_shape)
    local = partition.scatter(whole)
    axes = list(reversed(range(local.dim())))
    gathered = partition.gather(local.permute(*axes).contiguous().permute(*axes))
    assert gathered is None or torch.equal(gathered, whole)


def test_scattering_another_shape_is_refused_on_all_ranks(partition: Partition) -> None:
    wrong = torch.zeros(*partition.global_shape[:-1], partition.global_shape[-1] + 1)
    with pytest.raises(ValueError, match="cannot scatter shape"):
        partition.scatter(wrong if partition.comm.rank == 0 else None)


def test_gathering_another_shape_is_refused_on_all_ranks(partition: Partition) -> None:
    wrong = torch.zeros(*partition.local_shape[:-1], (partition.local_shape or (0,))[-1] + 1)
    with pytest.raises(ValueError, match="cannot gather shape"):
        partition.gather(wrong)


def test_a_view_shares_the_vec_s_memory_both_ways(partition: Partition, comm: MPI.Comm) -> None:
    vec = partition.create_vec()
    view = partition.view(vec)
    assert tuple(view.shape) == partition.local_shape
    assert view.dtype == torch.float64
    assert vec.getSizes() == (view.numel(), int(np.prod(partition.global_shape)))
    assert not view.any()
    view.copy_(partition.scatter(random(*partition.global_shape)))
    vec.stateIncrease()
    assert vec.norm() == pytest.approx(float(random(*partition.global_shape).norm()), rel=1e-13)
    vec.scale(-2.0)
    assert torch.equal(view, -2 * partition.scatter(random(*partition.global_shape)))


def test_a_vec_is_laid_out_in_rank_order(mesh: Mesh, comm: MPI.Comm) -> None:
    partition = BatchPartition(mesh, 7, (2,))
    vec = partition.create_vec()
    assert vec.getOwnershipRange() == (2 * partition.owned[0], 2 * partition.owned[1])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_rank_owns_at_least_a_stencil_width(width: int, mesh: Mesh) -> None:
    partition = GridPartition(mesh, (13, 12), stencil_width=width)
    assert min(partition.local_shape[:2]) >= width
    assert partition.processes[0] * partition.processes[1] == mesh.size


def test_the_process_grid_may_be_chosen(mesh: Mesh) -> None:
    for processes in ((mesh.size, 1), (1, mesh.size)):
        partition = GridPartition(mesh, (8, 9), processes=processes)
        assert partition.processes == processes
        split = 0 if processes[0] > 1 else 1
        assert partition.local_shape[1 - split] == (9, 8)[split] or mesh.size == 1
        assert partition.local_shape[split] <= -(-(8, 9)[split] // mesh.size)


def test_the_process_grid_may_be_chosen_along_three_axes(mesh: Mesh) -> None:
    for axis in range(3):
        processes = [1, 1, 1]
        processes[axis] = mesh.size
        partition = GridPartition(mesh, (5, 6, 7), processes=processes)
        assert partition.processes == tuple(processes)
        assert partition.position[axis] == mesh.state_comm.rank
        assert partition.smallest_block(axis) == min(
            stop - start for start, stop in mesh.state_comm.allgather(partition.owned[axis])
        )


@pytest.mark.parametrize(("shape", "multiple"), [((28,), 4), ((14, 12), (2, 3)), ((4, 6, 10), 2)])
def test_blocks_are_of_whole_multiples_and_differ_by_one_at_most(shape: Any, multiple: Any, mesh: Mesh) -> None:
    partition = GridPartition(mesh, shape, multiple_of=multiple)
    for axis, step in enumerate(partition.multiple_of):
        lengths = [stop - start for start, stop in mesh.state_comm.allgather(partition.owned[axis])]
        assert all(length % step == 0 for length in lengths)
        assert max(lengths) - min(lengths) in (0, step)
        assert partition.smallest_block(axis) == min(lengths)


@pytest.mark.parametrize(
    ("shape", "multiple", "factor"), [((28,), 4, 2), ((28,), 4, 4), ((14, 12), (2, 3), (1, 3)), ((4, 6, 10), 2, 2)]
)
def test_every_rank_keeps_its_part_of_the_domain_on_coarser_and_finer_grids(
    shape: Any, multiple: Any, factor: Any, mesh: Mesh
) -> None:
    partition = GridPartition(mesh, shape, 2, boundary="reflect", stencil_width=2, multiple_of=multiple)
    coarse = partition.coarsened(factor, channels=5)
    factors = [factor] * len(shape) if isinstance(factor, int) else factor
    assert (coarse.channels, coarse.boundary, coarse.processes) == (5, partition.boundary, partition.processes)
    assert coarse.stencil_width <= min(coarse.local_shape[:-1])
    for (start, stop), (first, last), step in zip(coarse.owned, partition.owned, factors, strict=True):
        assert (start * step, stop * step) == (first, last)
    fine = coarse.refined(factor)
    assert (fine.owned, fine.shape, fine.channels) == (partition.owned, partition.shape, 5)


def test_equal_blocks_can_be_coarsened_without_having_been_made_for_it(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (6 * mesh.size,), boundary="periodic")
    assert partition.coarsened(3).local_shape == (2, 1)
    assert partition.coarsened(3).coarsened(2).refined(6).owned == partition.owned


def test_blocks_of_no_whole_multiple_cannot_be_coarsened_on_any_rank(mesh: Mesh) -> None:
    # The first rank owns one point more than the others, if there are any.
    partition = GridPartition(mesh, (2 * mesh.size + 1, 8), processes=(mesh.size, 1))
    with pytest.raises(ConfigurationError, match=r"a rank owns 3 points along y, .* by 2: .* multiple_of = 2 there"):
        partition.coarsened(2)
    assert partition.coarsened((1, 2)).shape == (2 * mesh.size + 1, 4)


def test_more_ranks_than_the_grid_can_hold_are_refused_on_all_ranks(mesh: Mesh) -> None:
    # One row and column of blocks as wide as the stencil is all that fits.
    rows = mesh.size
    with pytest.raises(ConfigurationError, match=r"cannot be split over|fewer than") as caught:
        GridPartition(mesh, (2 * rows - 1 if rows > 1 else 1, 2 if rows > 1 else 1), stencil_width=2)
    assert "\n" not in str(caught.value)


def test_a_process_grid_that_leaves_a_rank_too_little_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=r"processes = \(1, \d\).*fewer than 3"):
        GridPartition(mesh, (50, 3 * mesh.size - 1), stencil_width=3, processes=(1, mesh.size))


def test_a_process_grid_of_another_size_is_refused(mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=rf"must multiply to {mesh.size} ranks"):
        GridPartition(mesh, (50, 50), processes=(mesh.size + 1, 1))


@pytest.mark.parametrize(
    "boundary",
    [
        ("open", "periodic"),
        ("zero", "mirror"),
        ("Periodic", "zero"),
        ("zero", float("nan")),
        ("zero", True),
        (None, 1.0),
    ],
    ids=str,
)
def test_an_unknown_boundary_is_refused_with_those_that_are_known(boundary: Any, mesh: Mesh) -> None:
    with pytest.raises(
        ConfigurationError, match="must be one of periodic, replicate, reflect, zero, or a finite number"
    ):
        GridPartition(mesh, (8, 8), boundary=boundary)
