"""Graphs at any number of ranks: who owns what, and ghosts that travel once, there and back."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GraphPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import gather, scatter, with_ghosts
from pnode_dist.partition import metis, ownership
from pnode_dist.verify.gradcheck import state_direction
from tests.oracles.graphs import grid_edges, random_edges
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

NODES, EDGES, FEATURES = 23, 90, 2
SIZE = MPI.COMM_WORLD.size
# The highest rank owns nothing, if there is another one; the others own nodes of all numbers.
GIVEN = np.random.default_rng(3).integers(0, max(SIZE - 1, 1), NODES)


@pytest.fixture(params=["bisection", "contiguous", "given", "average", "one node", "metis"])
def partition(request: pytest.FixtureRequest, mesh: Mesh) -> GraphPartition:
    """Split in each way. Only rank 0 gives the edges."""
    first = mesh.rank == 0
    if request.param == "metis" and not metis.has_metis():
        pytest.skip("pymetis is not installed")
    if request.param == "one node":
        return GraphPartition(mesh, torch.tensor([[0, 0], [0, 0]]) if first else None, 1, FEATURES)
    ownership = request.param if request.param != "given" else GIVEN if first else None
    return GraphPartition(mesh, random_edges(NODES, EDGES) if first else None, NODES, FEATURES, ownership)


def edges_of(partition: GraphPartition) -> torch.Tensor:
    """The whole graph again."""
    return random_edges(NODES, EDGES) if partition.global_shape[0] == NODES else torch.zeros(2, 2, dtype=torch.int64)


def seen(partition: GraphPartition) -> torch.Tensor:
    """The numbers of own nodes and ghosts."""
    return torch.from_numpy(np.concatenate([partition.owned, partition.ghosts]))


def test_every_node_and_every_edge_has_one_rank(partition: GraphPartition, comm: MPI.Comm) -> None:
    owned = np.concatenate(comm.allgather(partition.owned))
    assert sorted(owned) == list(range(partition.global_shape[0]))
    assert sorted(np.concatenate(comm.allgather(partition.edges))) == list(range(partition.global_edges))
    assert (np.diff(partition.owned) > 0).all()
    assert (np.diff(partition.edges) > 0).all()
    for rank, theirs in enumerate(comm.allgather(partition.owned)):
        assert np.array_equal(partition.owned_slices(rank)[0], theirs)


def test_a_rank_holds_the_edges_that_lead_to_its_nodes(partition: GraphPartition, comm: MPI.Comm) -> None:
    source, target = edges_of(partition)[:, partition.edges]
    own, numbers = torch.from_numpy(partition.owned), seen(partition)
    assert torch.equal(own[partition.targets], target)
    assert torch.equal(numbers[partition.sources], source)
    # No ghost that no edge needs, and none twice.
    foreign = set(source.tolist()) - set(own.tolist())
    assert sorted(partition.ghosts) == sorted(foreign)
    assert partition.edge_cut == comm.allreduce(sum(number in foreign for number in source.tolist()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_gather_undoes_scatter_in_the_caller_s_numbering(
    leading: tuple[int, ...], dtype: torch.dtype, partition: GraphPartition
) -> None:
    root = partition.comm.size - 1
    whole = (10 * random(*leading, *partition.global_shape)).to(dtype)
    local = partition.scatter(whole if partition.comm.rank == root else None, root)
    assert torch.equal(local, whole[..., partition.owned, :])
    gathered = partition.gather(local, root)
    assert gathered is None if partition.comm.rank != root else torch.equal(gathered, whole)


@pytest.mark.parametrize("shape", [(), (3,)], ids=["weights", "attributes"])
def test_edges_attributes_go_where_the_edges_are(shape: tuple[int, ...], partition: GraphPartition) -> None:
    root = partition.comm.size - 1
    whole = random(partition.global_edges, *shape)
    local = partition.scatter_edges(whole if partition.comm.rank == root else None, root)
    assert torch.equal(local, whole[partition.edges])
    if shape:
        stacked = torch.stack([whole, 2 * whole])
        assert torch.equal(partition.scatter_edges(stacked), stacked[:, partition.edges])


def test_a_vec_is_laid_out_like_the_partition(partition: GraphPartition) -> None:
    vec = partition.create_vec()
    assert vec.getSize() == np.prod(partition.global_shape)
    view = partition.view(vec)
    view.copy_(partition.scatter(random(*partition.global_shape)))
    vec.stateIncrease()
    assert vec.norm() == pytest.approx(random(*partition.global_shape).norm().item(), rel=1e-14)


def test_the_direction_of_gradient_checks_does_not_depend_on_the_ranks(partition: GraphPartition) -> None:
    alone = GraphPartition(MPI.COMM_SELF, edges_of(partition), *partition.global_shape)
    assert torch.equal(
        state_direction(partition, (2,), seed=5), state_direction(alone, (2,), seed=5)[:, partition.owned]
    )


def test_scatter_and_gather_are_differentiable(partition: GraphPartition) -> None:
    whole = random(*partition.global_shape).requires_grad_()
    at_root = partition.comm.rank == 0
    back = gather(scatter(whole if at_root else None, partition), partition)
    weight = random(*partition.global_shape, seed=8)
    share = (weight * back).sum() if at_root else back.sum()
    share.backward()  # type: ignore[no-untyped-call]
    assert not at_root or (whole.grad is not None and torch.equal(whole.grad, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (0,)], ids=str)
def test_ghosts_are_the_nodes_that_others_own(
    leading: tuple[int, ...], dtype: torch.dtype, partition: GraphPartition
) -> None:
    for features in (1, 5):
        whole = random(*leading, partition.global_shape[0], features, dtype=dtype)
        found = with_ghosts(whole[..., partition.owned, :], partition)
        assert found.dtype == dtype
        assert torch.equal(found, whole[..., seen(partition), :])


def test_the_adjoint_adds_up_what_every_copy_of_a_node_received(partition: GraphPartition, comm: MPI.Comm) -> None:
    whole = random(2, *partition.global_shape).requires_grad_()
    every = comm.allgather(seen(partition))
    weights = [random(2, len(numbers), FEATURES, seed=rank) for rank, numbers in enumerate(every)]
    total = torch.zeros((), dtype=torch.float64)
    for numbers, weight in zip(every, weights, strict=True):
        total = total + (weight * torch.sin(whole[:, numbers])).sum()
    (wanted,) = torch.autograd.grad(total, whole)
    local = whole.detach()[:, partition.owned].requires_grad_()
    share = (weights[comm.rank] * torch.sin(with_ghosts(local, partition))).sum()
    (found,) = torch.autograd.grad(share, local)
    assert distance(found, wanted[:, partition.owned]) <= 1e-14


def test_all_derivatives_of_the_exchange_are_those_of_the_whole(partition: GraphPartition, comm: MPI.Comm) -> None:
    x, v = random(*partition.global_shape), random(*partition.global_shape, seed=2)
    own, direction = x[partition.owned], v[partition.owned]

    def extended(u: torch.Tensor) -> torch.Tensor:
        return with_ghosts(u, partition)

    assert torch.equal(torch.func.jvp(extended, (own,), (direction,))[1], v[seen(partition)])
    many = torch.func.vmap(extended, in_dims=1)(torch.stack([own, direction], dim=1))
    assert torch.equal(many, torch.stack([x, v])[:, seen(partition)])
    # d/du of the sum over all copies of u^3 / 3 is copies u^2, its derivative along v is 2 copies u v.
    copies = torch.bincount(torch.cat(comm.allgather(seen(partition))), minlength=len(x)).double()[:, None]
    leaf = own.clone().requires_grad_()
    (first,) = torch.autograd.grad((extended(leaf) ** 3).sum() / 3, leaf, create_graph=True)
    assert distance(first, (copies * x**2)[partition.owned]) <= 1e-14
    (second,) = torch.autograd.grad(first, leaf, direction)
    assert distance(second, (2 * copies * x * v)[partition.owned]) <= 1e-14


class Counting(MPI.Intracomm):
    """All ranks, with every message that is sent counted: by receiver, how many and how many bytes."""

    messages: Counter[int]
    volume: Counter[int]

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
        self.messages[dest] += 1
        self.volume[dest] += buf[0].nbytes
        return super().Isend(buf, dest, tag)


def test_one_message_to_each_neighbour_and_no_byte_beside_the_ghosts(comm: MPI.Comm) -> None:
    counting = Counting(comm)
    partition = GraphPartition(counting, grid_edges(6, 5) if comm.rank == 0 else None, 30)
    ghosts = comm.allgather(Counter(owner for part in partition.received for owner in [part.rank] * len_of(part)))
    expected = {rank: theirs[comm.rank] for rank, theirs in enumerate(ghosts) if theirs[comm.rank]}
    assert set(expected) == {part.rank for part in partition.sent}
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 2)):
        x = random(3, len(partition.owned), 4, dtype=dtype).requires_grad_()
        counting.messages, counting.volume = Counter(), Counter()
        image = with_ghosts(x, partition)
        assert counting.messages == dict.fromkeys(expected, 1)
        assert counting.volume == {rank: 3 * 4 * size * nodes for rank, nodes in expected.items()}
        counting.messages, counting.volume = Counter(), Counter()
        image.sum().backward()  # type: ignore[no-untyped-call]
        assert counting.messages == {part.rank: 1 for part in partition.received}
        assert counting.volume == {part.rank: 3 * 4 * size * len_of(part) for part in partition.received}


def len_of(part: Any) -> int:
    return int(part.stop - part.start)


def test_nothing_is_exchanged_where_no_edge_is_cut(comm: MPI.Comm) -> None:
    blocks = torch.cat([grid_edges(3, 2) + 6 * rank for rank in range(comm.size)], dim=1)
    counting = Counting(comm)
    counting.messages = counting.volume = Counter()
    partition = GraphPartition(counting, blocks, 6 * comm.size)
    assert partition.edge_cut == 0
    x = random(6, 1)
    assert with_ghosts(x, partition) is x
    assert not counting.messages


def test_gradients_do_not_depend_on_who_is_first(mesh: Mesh, comm: MPI.Comm) -> None:
    partition = GraphPartition(mesh, random_edges(NODES, 400), NODES, 1, "contiguous")
    x = random(NODES, 1)[partition.owned].requires_grad_()
    # Of such different sizes that every order of additions rounds to other bits.
    weight = random(len(seen(partition)), 1, seed=comm.rank) * 10.0 ** (4 * comm.rank)

    def gradient(late: int) -> bytes:
        image = (weight * with_ghosts(x, partition)).sum()
        if comm.rank == late:
            time.sleep(0.01)
        (found,) = torch.autograd.grad(image, x)
        return found.numpy().tobytes()

    assert len({gradient(late) for late in range(comm.size)}) == 1


def test_petsc_s_average_partitioning_gives_equal_ranges(mesh: Mesh) -> None:
    edges = random_edges(NODES, EDGES)
    found, wanted = (GraphPartition(mesh, edges, NODES, ownership=name) for name in ("average", "contiguous"))
    assert np.array_equal(found.owned, wanted.owned)


def test_an_unknown_partitioner_is_refused_on_all_ranks_with_those_that_petsc_has(mesh: Mesh) -> None:
    names = ownership.available()
    assert {"bisection", "contiguous", "average"} <= set(names)
    missing = next(name for name in ("parmetis", "ptscotch", "nonsense") if name not in names)
    with pytest.raises(ConfigurationError) as caught:
        GraphPartition(mesh, random_edges(NODES, EDGES), NODES, ownership=missing)
    assert str(caught.value) == (
        f"ownership = {missing!r}: must be the owner of each node, or one of {', '.join(names)}"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"edge_index": [[0, 23], [1, 2]]}, "edge_index: nodes from 0 to 23: must be from 0 to 22"),
        ({"edge_index": [[0, -1], [1, 2]]}, "edge_index: nodes from -1 to 2: must be from 0 to 22"),
        ({"edge_index": [0, 1]}, r"edge_index: an array of shape \(2,\) and type int64: must be \[2, edges\]"),
        ({"edge_index": None}, r"edge_index: an array of shape \(\) and type object: must be \[2, edges\]"),
        ({"nodes": 0}, "graph: nodes = 0, features = 1: must be at least 1"),
        ({"ownership": [0, 0]}, r"ownership: an array of shape \(2,\) and type int64: must be one integer for each"),
        ({"ownership": [SIZE] * NODES}, f"ownership: owners from {SIZE} to {SIZE}: must be ranks from 0 to {SIZE - 1}"),
        ({"coordinates": [[0.0, 1.0]]}, r"coordinates: an array of shape \(1, 2\): must be finite and \[23, dim"),
    ],
)
def test_wrong_graphs_are_refused_on_all_ranks(changed: dict[str, Any], message: str, mesh: Mesh) -> None:
    given = {"edge_index": random_edges(NODES, EDGES), "nodes": NODES, **changed}
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        GraphPartition(mesh, **given)


def test_a_state_of_another_shape_is_refused(partition: GraphPartition) -> None:
    with pytest.raises(ValueError, match="with_ghosts: got shape"):
        with_ghosts(torch.zeros(partition.local_shape[0] + 1, 2), partition)
    with pytest.raises(ValueError, match="with_ghosts: got shape"):
        with_ghosts(torch.zeros(partition.local_shape[0]), partition)
