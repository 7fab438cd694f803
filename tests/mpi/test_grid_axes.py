"""Halos of grids of one and three axes, and the two halves that a halo is made of: neighbours and edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import halo, neighbour_halo, pad_edges
from tests.mpi.grids import block, blocks
from tests.mpi.test_exchange import inner, positive
from tests.oracles.fields import padded
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

Rules = tuple[str | float, ...]
CUBE = (6, 7, 9)
CASES: list[Rules] = [
    ("periodic",),
    ("replicate",),
    ("reflect",),
    ("zero",),
    (1.5,),
    ("periodic", "periodic", "periodic"),
    ("replicate", "reflect", "periodic"),
    ("periodic", "replicate", "zero"),
    (-2.0, "periodic", "reflect"),
    ("reflect", 1.5, "replicate"),
    ("zero", "reflect", 0.5),
]
PLANE: list[Rules] = [("replicate", "periodic"), ("periodic", "reflect"), (1.5, "replicate"), ("zero", -2.0)]


def partition_of(mesh: Mesh, boundary: Rules, **settings: Any) -> GridPartition:
    """A grid of as many axes as there are rules."""
    shape = {1: (23,), 2: (9, 13), 3: CUBE}[len(boundary)]
    return GridPartition(mesh, shape, channels=2, boundary=boundary, **settings)


def widths(partition: GridPartition) -> list[tuple[int | tuple[int, int], ...]]:
    """Widths that differ between the axes and between their sides."""
    axes = len(partition.shape)
    return [(1,) * axes, (2, 1, 0)[:axes], (0, 2, 1)[-axes:], ((1, 2), (0, 1), (2, 0))[:axes]]


@pytest.mark.parametrize("boundary", [*CASES, *PLANE], ids=str)
def test_a_halo_and_its_gradient_are_those_of_the_padded_whole_field(boundary: Rules, mesh: Mesh) -> None:
    partition = partition_of(mesh, boundary)
    whole = random(2, *partition.global_shape).requires_grad_()
    for width in widths(partition):
        wanted = padded(whole, boundary, width)
        local = block(partition, whole.detach()).clone().requires_grad_()
        found = halo(local, partition, width)
        assert torch.equal(found, block(partition, wanted, width)), width
        weights = [random(*part.shape, seed=rank) for rank, part in enumerate(blocks(partition, wanted, width))]
        loss = sum((w * part).sum() for w, part in zip(weights, blocks(partition, wanted, width), strict=True))
        (gradient_wanted,) = torch.autograd.grad(loss, [whole])
        (gradient,) = torch.autograd.grad((weights[partition.comm.rank] * found).sum(), [local])
        assert distance(gradient, block(partition, gradient_wanted)) <= 1e-14, width


@pytest.mark.parametrize("boundary", [("reflect",), ("periodic", "replicate", 1.5)], ids=str)
def test_tangents_and_batched_tangents_are_those_of_the_padded_whole_field(boundary: Rules, mesh: Mesh) -> None:
    partition = partition_of(mesh, boundary)
    whole, tangents = random(*partition.global_shape), random(3, *partition.global_shape, seed=3)
    width = (1,) * len(boundary)

    def pushed(v: torch.Tensor) -> torch.Tensor:
        tangent: torch.Tensor = torch.func.jvp(lambda u: halo(u, partition), (block(partition, whole),), (v,))[1]
        return tangent

    zero_beyond = ["zero" if isinstance(rule, float) else rule for rule in boundary]
    wanted = block(partition, padded(tangents, zero_beyond, width), width)
    assert torch.equal(pushed(block(partition, tangents[0])), wanted[0])
    assert torch.equal(torch.func.vmap(pushed)(block(partition, tangents)), wanted)


@pytest.mark.parametrize("boundary", [("periodic",), ("periodic", "periodic"), ("periodic",) * 3], ids=len)
def test_a_periodic_halo_is_petsc_s_own(boundary: Rules, mesh: Mesh) -> None:
    partition = partition_of(mesh, boundary, stencil_width=1)
    assert tuple(reversed(partition.dm.getRanges())) == partition.owned
    assert partition.dm.getSizes() == partition.shape[::-1]
    local = block(partition, random(*partition.global_shape))
    inside, around = partition.create_vec(), partition.dm.createLocalVec()
    partition.view(inside).copy_(local)
    partition.dm.globalToLocal(inside, around)
    found = halo(local, partition)
    assert np.array_equal(found.numpy(), around.getArray().reshape(found.shape))


@pytest.mark.parametrize("boundary", [*CASES, *PLANE], ids=str)
def test_a_halo_is_what_the_neighbours_give_with_the_edges_padded(boundary: Rules, mesh: Mesh) -> None:
    partition = partition_of(mesh, boundary)
    whole = block(partition, random(2, *partition.global_shape))
    for width in widths(partition):
        gradients = []
        values = []
        for way in (halo, lambda u, p, w: pad_edges(neighbour_halo(u, p, w), p, w)):
            local = whole.clone().requires_grad_()
            values.append(way(local, partition, width))
            weight = random(*values[-1].shape, seed=partition.comm.rank)
            gradients.extend(torch.autograd.grad((weight * values[-1]).sum(), [local]))
        assert torch.equal(values[0], values[1]), width
        # The two add what corners give back in different orders.
        assert distance(gradients[0], gradients[1]) <= 1e-14, width


@pytest.mark.parametrize("boundary", [("replicate",), ("zero", "reflect"), (1.5, "replicate", "periodic")], ids=str)
def test_a_neighbour_halo_is_a_wider_block_of_the_whole_field(boundary: Rules, mesh: Mesh) -> None:
    partition = partition_of(mesh, boundary)
    whole = random(*partition.global_shape)
    found = neighbour_halo(block(partition, whole), partition, 2)
    wanted = whole
    for axis, (n, (start, stop)) in enumerate(zip(partition.shape, partition.owned, strict=True)):
        places = torch.arange(start - 2, stop + 2)
        kept = places % n if boundary[axis] == "periodic" else places[(places >= 0) & (places < n)]
        wanted = wanted.index_select(axis, kept)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "boundary", [("replicate",), ("periodic", "reflect"), ("zero", "replicate", "reflect")], ids=str
)
def test_padding_a_block_with_some_neighbours_points_takes_no_others(boundary: Rules, mesh: Mesh) -> None:
    # Two layers of width 1 after one exchange of width 2, as two exchanges of width 1 would give it.
    partition = partition_of(mesh, boundary)
    local = block(partition, random(*partition.global_shape))
    wide = neighbour_halo(local, partition, 2)
    for _ in range(2):
        wide = shifted(pad_edges(wide, partition, 1), len(boundary))
        local = shifted(halo(local, partition, 1), len(boundary))
    assert torch.equal(wide, local)


def shifted(x: torch.Tensor, axes: int) -> torch.Tensor:
    """A difference of neighbours along all axes: one point less on every side."""
    for axis in range(-axes - 1, -1):
        n = x.shape[axis]
        x = x.narrow(axis, 2, n - 2) - 2 * x.narrow(axis, 1, n - 2) - x.narrow(axis, 0, n - 2)
    return x


@pytest.mark.parametrize("exchange", [halo, neighbour_halo, pad_edges])
@pytest.mark.parametrize(
    "boundary", [("replicate",), ("periodic", "reflect"), ("reflect", "replicate", "zero")], ids=str
)
def test_the_adjoint_is_the_transpose(boundary: Rules, exchange: Any, mesh: Mesh, comm: MPI.Comm) -> None:
    partition = partition_of(mesh, boundary)
    for width in widths(partition):
        x = block(partition, positive(2, *partition.global_shape, seed=1)).clone().requires_grad_()
        image = exchange(x, partition, width)
        y = positive(*image.shape, seed=2 + comm.rank)
        (pulled_back,) = torch.autograd.grad((image * y).sum(), x)
        assert inner(comm, (pulled_back, x.detach())) == pytest.approx(inner(comm, (y, image.detach())), rel=1e-13)


class CountedMessages:
    """A communicator that counts what is received through it."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.messages, self.bytes = 0, 0

    def Irecv(self, buffer: Sequence[Any], source: int, tag: int) -> MPI.Request:
        self.messages += 1
        self.bytes += buffer[0].nbytes
        return self.comm.Irecv(buffer, source, tag)

    def Isend(self, buffer: Sequence[Any], target: int, tag: int) -> MPI.Request:
        return self.comm.Isend(buffer, target, tag)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("ends", ["open", "joined"])
def test_every_point_of_another_rank_comes_once_in_two_messages_an_axis(axes: int, ends: str, mesh: Mesh) -> None:
    # Joined ends along the one axis that is split: along another one a rank would be its own neighbour.
    boundary = (*["replicate"] * (axes - 1), "replicate" if ends == "open" else "periodic")
    processes = None if ends == "open" else (*[1] * (axes - 1), mesh.size)
    partition = partition_of(mesh, boundary, processes=processes)
    counted = CountedMessages(partition.comm)
    partition.comm = counted  # type: ignore[assignment]
    x = random(2, *partition.local_shape)
    image = neighbour_halo(x, partition, 1)
    assert counted.messages <= 2 * sum(p > 1 for p in partition.processes)
    assert counted.bytes == (8 * (image.numel() - x.numel()) if mesh.size > 1 else 0)


@pytest.mark.parametrize("exchange", [halo, neighbour_halo, pad_edges])
def test_widths_and_shapes_that_do_not_fit_are_refused_on_all_ranks(exchange: Any, mesh: Mesh) -> None:
    partition = partition_of(mesh, ("replicate", "reflect", "zero"))
    name = exchange.__name__
    block = torch.zeros(partition.local_shape)
    smallest = tuple(map(partition.smallest_block, range(3)))
    most = smallest if exchange is neighbour_halo else (smallest[0], smallest[1] - 1, smallest[2])
    for width in ((most[0] + 1, 0, 0), (0, most[1] + 1, 0), (0, 0, (0, -1))):
        with pytest.raises(ConfigurationError, match=rf"{name}: width = .*: must be between 0 and .* has, ") as caught:
            exchange(block, partition, width)
        assert str(most) in str(caught.value)
    exchange(block, partition, most)
    with pytest.raises(ConfigurationError, match=rf"{name}: width = \(1, 1\): must have one entry for each of z, y, x"):
        exchange(block, partition, (1, 1))
    for wrong in (block[0], block[:-1], block[..., 0]):
        with pytest.raises(ValueError, match=f"{name}: got shape .*, this rank owns"):
            exchange(wrong, partition, 1)
