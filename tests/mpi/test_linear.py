"""Dense layers between partitioned vectors are torch's between whole ones."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import DensePartition, Mesh, NeuralODE, Trajectory
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import gather_vector, reduce_vector
from pnode_dist.nn import Linear
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

# Of 3 entries a fourth rank has none.
SIZES = [(7, 10), (10, 7), (3, 5), (5, 3)]


def part(whole: torch.Tensor, partition: DensePartition) -> torch.Tensor:
    return whole.detach()[..., slice(*partition.owned)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("size", [1, 3, 10])
def test_a_vector_is_gathered_and_reduced_as_a_whole(
    size: int, leading: tuple[int, ...], dtype: torch.dtype, mesh: Mesh
) -> None:
    partition = DensePartition(mesh, size)
    whole = random(*leading, size, dtype=dtype)
    assert torch.equal(gather_vector(part(whole, partition), partition), whole)
    # Small integers: their sums are exact in any order.
    terms = [torch.full((*leading, size), float(rank + 1), dtype=dtype) for rank in range(mesh.size)]
    found = reduce_vector(terms[partition.comm.rank], partition)
    assert torch.equal(found, part(sum(terms, torch.zeros(*leading, size, dtype=dtype)), partition))


def test_gathering_and_reducing_are_transposes_in_both_modes(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 7)
    x, y = random(2, *partition.local_shape, seed=mesh.rank), random(2, 7, seed=10 + mesh.rank)
    for operation, given, cotangent, transpose in (
        (gather_vector, x, y, reduce_vector),
        (reduce_vector, y, x, gather_vector),
    ):
        leaf = given.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((operation(leaf, partition) * cotangent).sum(), [leaf])
        assert torch.equal(gradient, transpose(cotangent, partition))
        _, tangent = torch.func.jvp(lambda u, op=operation: op(u, partition), (given,), (2.0 * given,))
        assert torch.equal(tangent, operation(2.0 * given, partition))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("split", ["column", "row", None])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients_are_torch_s(sizes: tuple[int, int], split: str | None, bias: bool, mesh: Mesh) -> None:
    inputs, outputs = (DensePartition(mesh, size) for size in sizes)
    torch.manual_seed(1)
    own = Linear(inputs, outputs, bias, torch.float64, split)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
    assert {name: value.tolist() for name, value in own.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    whole = random(4, sizes[0]).requires_grad_()
    wanted, weight = model(whole), random(4, sizes[1], seed=3)
    gradients_wanted = torch.autograd.grad((wanted * weight).sum(), [whole, *model.parameters()])
    local = part(whole, inputs).clone().requires_grad_()
    found = own(local)
    assert found.shape == (4, *outputs.local_shape)
    assert close(found, part(wanted, outputs))
    gradients = torch.autograd.grad((found * part(weight, outputs)).sum(), [local, *own.parameters()])
    assert close(gradients[0], part(gradients_wanted[0], inputs))
    for gradient, total in zip(gradients[1:], gradients_wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), total) <= 1e-12


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether parts agree that may be empty."""
    return found.shape == wanted.shape and (found.numel() == 0 or distance(found, wanted) <= 1e-12)


def test_the_split_that_sends_less_is_taken(mesh: Mesh) -> None:
    small, large = DensePartition(mesh, 6), DensePartition(mesh, 60)
    assert Linear(small, large).split == "column"
    assert Linear(large, small).split == "row"


def test_the_gradient_of_a_solve_of_coupled_entries_is_that_on_one_rank(mesh: Mesh) -> None:
    class Coupled(nn.Module):
        def __init__(self, place: Mesh | MPI.Comm) -> None:
            super().__init__()
            state, hidden = DensePartition(place, 9), DensePartition(place, 14)
            torch.manual_seed(2)
            self.first = Linear(state, hidden, dtype=torch.float64)
            self.second = Linear(hidden, state, dtype=torch.float64)

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(u)))

    whole = random(9)
    partition = DensePartition(mesh, 9)
    budget = Trajectory(ram_slots=2)
    model = parallel(NeuralODE(Coupled(mesh), step_size=0.25, partition=partition, trajectory=budget), mesh)
    model(part(whole, partition), [0.0, 1.0])[-1].square().sum().backward()
    alone = NeuralODE(Coupled(MPI.COMM_SELF), step_size=0.25, partition=DensePartition(MPI.COMM_SELF, 9))
    alone(whole, [0.0, 1.0])[-1].square().sum().backward()
    for found, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert distance(found.grad, wanted.grad) <= 1e-12


@pytest.mark.parametrize("size", [0, -3])
def test_a_vector_without_entries_is_refused(size: int, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=f"size = {size}: must be at least 1"):
        DensePartition(mesh, size)


def test_another_split_is_refused_with_those_that_are_known(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 4)
    with pytest.raises(ConfigurationError, match="split = 'diagonal': must be 'column', 'row' or None"):
        Linear(partition, partition, split="diagonal")  # type: ignore[arg-type]
