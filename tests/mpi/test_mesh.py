"""The mesh at any number of ranks: who is where, sums over each extent, backends, opening and closing."""

import sys
import threading

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Extent
from pnode_dist.errors import ConfigurationError
from tests.mpi.conftest import SPLITS

pytestmark = pytest.mark.mpi

WORLD = MPI.COMM_WORLD


def test_all_ranks_are_state_ranks_by_default() -> None:
    with Mesh() as mesh:
        assert (mesh.rank, mesh.size) == (WORLD.rank, WORLD.size)
        assert (mesh.state_ranks, mesh.state_rank, mesh.data_replicas, mesh.replica) == (WORLD.size, WORLD.rank, 1, 0)
        assert mesh.backend == "mpi"
        assert mesh.is_root == (WORLD.rank == 0)


def test_the_state_takes_the_ranks_that_data_leaves() -> None:
    for _, data in SPLITS:
        with Mesh(data=data) as mesh:
            assert (mesh.state_ranks, mesh.data_replicas) == (WORLD.size // data, data)


def test_state_ranks_of_a_replica_are_neighbours(split: Mesh) -> None:
    assert split.rank == split.replica * split.state_ranks + split.state_rank
    assert 0 <= split.state_rank < split.state_ranks
    assert 0 <= split.replica < split.data_replicas
    assert (split.state_comm.rank, split.state_comm.size) == (split.state_rank, split.state_ranks)
    assert split.state_comm.allgather(split.replica) == [split.replica] * split.state_ranks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_sums_and_maxima_run_over_their_extent(dtype: torch.dtype, split: Mesh) -> None:
    members = {
        "world": range(split.size),
        "state": [split.replica * split.state_ranks + s for s in range(split.state_ranks)],
        "data": [r * split.state_ranks + split.state_rank for r in range(split.data_replicas)],
    }
    value = torch.tensor([[1, 10**split.rank], [split.rank, -split.rank]], dtype=dtype)
    before = value.clone()
    for over, ranks in members.items():
        values = [torch.tensor([[1, 10**r], [r, -r]], dtype=dtype) for r in ranks]
        total, largest = split.sum(value, over=over), split.max(value, over=over)  # type: ignore[arg-type]
        assert torch.equal(total, torch.stack(values).sum(0))
        assert torch.equal(largest, torch.stack(values).amax(0))
        assert total.dtype == largest.dtype == dtype
    assert torch.equal(value, before)


def test_a_sum_is_outside_the_graph_and_takes_any_layout(split: Mesh) -> None:
    value = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    total = split.sum(value)
    assert not total.requires_grad
    assert torch.equal(total, value.detach() * split.size)
    assert torch.equal(split.sum(torch.tensor(2.0)), torch.tensor(2.0 * split.size))


def test_a_sum_has_the_same_bits_on_all_ranks(split: Mesh) -> None:
    value = torch.rand(101, generator=torch.Generator().manual_seed(split.rank), dtype=torch.float64)
    assert len(set(WORLD.allgather(split.sum(value).numpy().tobytes()))) == 1


def test_an_object_comes_from_the_rank_that_is_asked(split: Mesh) -> None:
    for source in range(split.size):
        found = split.broadcast_object({"from": split.rank, "text": "é" * split.rank}, source=source)
        assert found == {"from": source, "text": "é" * source}


@pytest.mark.parametrize("over", ["world", "state", "data"])
def test_objects_and_errors_stay_within_their_extent(over: Extent, split: Mesh) -> None:
    ranks = {"world": split.world_group, "state": split.state_group, "data": split.data_group}[over]
    members = dist.get_process_group_ranks(ranks)
    assert split.broadcast_object(split.rank, over=over) == members[0]
    assert split.broadcast_object(split.rank, source=members[-1], over=over) == members[-1]

    def fail() -> None:
        if split.rank in (members[-1], split.size - 1):
            raise ConfigurationError(f"rank {split.rank} cannot go on")

    with pytest.raises(ConfigurationError, match=f"^rank {members[-1]} cannot go on$"):
        agreed(split, fail, over)
    assert agreed(split, lambda: split.rank, over) == split.rank


def test_a_barrier_waits_for_all(split: Mesh) -> None:
    for _ in range(3):
        split.barrier()


def test_groups_have_the_members_of_their_extent(split: Mesh) -> None:
    assert dist.get_world_size(split.world_group) == split.size
    assert dist.get_world_size(split.state_group) == split.state_ranks
    assert dist.get_world_size(split.data_group) == split.data_replicas
    assert dist.get_rank(split.state_group) == split.state_rank
    assert dist.get_rank(split.data_group) == split.replica


def test_torch_s_own_collectives_run_over_the_groups(split: Mesh) -> None:
    gathered = [torch.zeros(2) for _ in range(split.state_ranks)]
    dist.all_gather(gathered, torch.full((2,), float(split.state_rank)), group=split.state_group)
    assert [float(part[0]) for part in gathered] == list(range(split.state_ranks))
    value = torch.full((3,), float(split.rank))
    dist.broadcast(value, src=split.size - 1, group=split.world_group)
    assert torch.equal(value, torch.full((3,), float(split.size - 1)))


def test_closing_leaves_nothing_of_torch_distributed(backend: str) -> None:
    for _ in range(2):
        mesh = Mesh(backend=backend)
        assert dist.is_initialized()
        mesh.close()
        assert not dist.is_initialized()
        mesh.close()


def test_backends_may_follow_each_other() -> None:
    for backend in ("mpi", "gloo", "mpi"):
        with Mesh(backend=backend) as mesh:
            assert mesh.sum(torch.ones(1)).item() == WORLD.size


def test_two_meshes_may_be_open_at_once() -> None:
    with Mesh() as first, Mesh(state=1, data=WORLD.size) as second:
        assert first.sum(torch.ones(1), over="state").item() == WORLD.size
        assert second.sum(torch.ones(1), over="state").item() == 1
        assert second.sum(torch.ones(1), over="data").item() == WORLD.size
        second.close()
        assert first.sum(torch.ones(1)).item() == WORLD.size
    assert not dist.is_initialized()


def test_another_backend_beside_an_open_mesh_is_refused() -> None:
    with Mesh(backend="mpi") as mesh:
        with pytest.raises(ConfigurationError, match="another Mesh with 'mpi' is open"):
            Mesh(backend="gloo")
        assert mesh.sum(torch.ones(1)).item() == WORLD.size


def test_many_meshes_leak_no_communicators() -> None:
    # MPI libraries have about two thousand communicators to give, and a mesh takes four. Ranks that share a core need
    # long for that, and would leak the same; so would one.
    for _ in range(520 if WORLD.size == 2 else 20):
        Mesh().close()
    with Mesh() as mesh:
        assert mesh.sum(torch.ones(1)).item() == WORLD.size


@pytest.mark.parametrize(
    ("state", "data", "complaint"),
    [
        (WORLD.size + 1, 1, f"{WORLD.size} rank"),
        (None, WORLD.size + 1, f"does not divide the {WORLD.size} ranks"),
        (WORLD.size, 2, f"is {2 * WORLD.size}, but {WORLD.size} rank"),
        (0, 1, "must be at least 1"),
        (None, 0, "must be at least 1"),
        (-1, -WORLD.size, "must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks_is_refused(state: int | None, data: int, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        Mesh(state, data)
    assert str(caught.value).startswith("mesh: ")
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_an_unknown_backend_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match="backend = 'smoke': must be one of mpi, gloo"):
        Mesh(backend="smoke")


def test_the_hooks_for_uncaught_exceptions_go_with_the_mesh() -> None:
    before = (sys.excepthook, threading.excepthook)
    with Mesh():
        pass
    assert (sys.excepthook, threading.excepthook) == before
