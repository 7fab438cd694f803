"""Parameter gradients over the mesh: the sum over state ranks, the mean over replicas, the same bits everywhere."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import BatchPartition, DensePartition, GridPartition, Mesh, NeuralODE
from pnode_dist.distributed.gradients import broadcast_parameters, parallel, share_of_mean
from pnode_dist.distributed.sampler import ReplicaSampler
from pnode_dist.nn import Conv2d, Linear
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

WORLD = MPI.COMM_WORLD
TIMES, SAMPLES = [0.0, 0.4, 1.0], 5


def same_on_all_ranks(tensors: list[torch.Tensor]) -> bool:
    return len(set(WORLD.allgather(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)))) == 1


def gradients_of(module: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_is_the_sum_over_the_state_and_the_mean_over_replicas(dtype: torch.dtype, split: Mesh) -> None:
    network = Network(dtype=dtype)
    partition = BatchPartition(split, SAMPLES, (3,))
    model = parallel(NeuralODE(network, step_size=0.2, partition=partition), split)
    # Every replica has a batch of its own.
    batches = [random(SAMPLES, 3, seed=10 + replica, dtype=dtype) for replica in range(split.data_replicas)]
    solution = model(partition.scatter(batches[split.replica]), TIMES)
    (torch.sin(solution).sum() / SAMPLES).backward()
    serial = [torch.sin(odeint_plain(network, batch, TIMES, TABLEAUX["4"], 0.2)).sum() / SAMPLES for batch in batches]
    wanted = torch.autograd.grad(torch.stack(serial).mean(), list(network.parameters()))
    found = gradients_of(network)
    assert distance(found, wanted) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert same_on_all_ranks(found)


BOUNDARY = ("replicate", "periodic")
Tensor = torch.Tensor


class OnGrid(nn.Module):
    """Two convolutions on a field of odd size."""

    shape: tuple[int, ...] = (7, 9, 2)

    def __init__(self, place: Mesh) -> None:
        super().__init__()
        self.partition = GridPartition(place, (7, 9), 2, BOUNDARY)
        torch.manual_seed(2)
        self.first = Conv2d(self.partition, 2, 3, dtype=torch.float64)
        self.second = Conv2d(self.partition, 3, 2, 1, dtype=torch.float64)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(u)))

    def plain(self, t: Tensor, u: Tensor) -> Tensor:
        """The same of whole fields, in plain torch."""
        hidden = torch.tanh(convolved(u, BOUNDARY, self.first.weight, self.first.bias))
        return convolved(hidden, BOUNDARY, self.second.weight, self.second.bias)


class OnVector(nn.Module):
    """Two dense layers, between vectors of 9 and 3 entries, of the latter a fourth rank has none."""

    shape: tuple[int, ...] = (9,)

    def __init__(self, place: Mesh) -> None:
        super().__init__()
        self.partition, hidden = DensePartition(place, 9), DensePartition(place, 3)
        torch.manual_seed(2)
        self.first = Linear(self.partition, hidden, dtype=torch.float64)
        self.second = Linear(hidden, self.partition, dtype=torch.float64)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(u)))

    def plain(self, t: Tensor, u: Tensor) -> Tensor:
        """The same of whole vectors, in plain torch."""
        hidden = torch.tanh(nn.functional.linear(u, self.first.weight, self.first.bias))
        return nn.functional.linear(hidden, self.second.weight, self.second.bias)


@pytest.mark.parametrize("network", [OnGrid, OnVector])
def test_the_gradient_of_a_mean_over_samples_is_that_of_one_process_on_every_mesh(
    network: Callable[[Mesh], OnGrid | OnVector], split: Mesh
) -> None:
    func = network(split)
    samples = random(5, *func.shape, seed=4)
    model = parallel(NeuralODE(func, step_size=0.25, partition=func.partition), split)
    # Batches of 3 and 2: replicas have unequally many of their samples, and a fourth replica none at all.
    for share in ReplicaSampler(len(samples), 3, split):
        local = func.partition.scatter(samples[share])
        total = torch.sin(model(local, TIMES)[1:]).sum()
        share_of_mean(total, 2 * len(share) * samples[0].numel(), split).backward()
    found = gradients_of(func)
    losses = [
        torch.sin(odeint_plain(func.plain, samples[share], TIMES, TABLEAUX["4"], 0.25)[1:]).mean()
        for share in whole_batches(len(samples), 3)
    ]
    wanted = torch.autograd.grad(torch.stack(losses).sum(), list(func.parameters()))
    assert distance(found, wanted) <= 1e-12
    assert same_on_all_ranks(found)


def whole_batches(samples: int, size: int) -> list[list[int]]:
    """The batches as one replica has them."""
    alone: Any = SimpleNamespace(replica=0, data_replicas=1)
    return list(ReplicaSampler(samples, size, alone))


def test_a_mean_over_no_samples_is_refused_on_all(split: Mesh) -> None:
    with pytest.raises(ValueError, match="no mean over no samples"):
        share_of_mean(torch.zeros(()), 0, split)


def test_parameters_come_from_rank_0(split: Mesh) -> None:
    network = Network(seed=split.rank)
    parallel(network, split)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), Network(seed=0).parameters(), strict=True))
    other = Network(seed=split.rank)
    broadcast_parameters(other, split)
    assert same_on_all_ranks(list(other.parameters()))


def test_buffers_stay_a_rank_s_own(split: Mesh) -> None:
    network = Network()
    network.register_buffer("mask", torch.full((2,), float(split.rank)))
    model = parallel(network, split)
    for _ in range(2):
        model(torch.tensor(0.0), random(2, 3)).sum().backward()
    assert torch.equal(network.get_buffer("mask"), torch.full((2,), float(split.rank)))


def test_training_keeps_the_parameters_of_all_ranks_equal_to_the_bit(split: Mesh) -> None:
    partition = BatchPartition(split, SAMPLES, (3,))
    network = Network(seed=split.rank)
    model = parallel(NeuralODE(network, step_size=0.5, partition=partition), split)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        batch = partition.scatter(random(SAMPLES, 3, seed=100 * split.replica + step))
        (model(batch, TIMES) ** 2).sum().backward()
        optimizer.step()
        assert same_on_all_ranks(gradients_of(network))
        assert same_on_all_ranks(list(network.parameters()))
    assert not torch.equal(next(network.parameters()), next(Network(seed=0).parameters()))


def test_gradients_accumulate_over_backward_passes(split: Mesh) -> None:
    network = Network()
    model = parallel(network, split)
    u, t = random(2, 3, seed=split.rank), torch.tensor(0.3, dtype=torch.float64)
    model(t, u).sum().backward()
    once = [gradient.clone() for gradient in gradients_of(network)]
    model(t, u).sum().backward()
    assert distance(gradients_of(network), [2 * gradient for gradient in once]) <= 1e-12
    network.zero_grad()
    with model.no_sync():
        model(t, u).sum().backward()
    model(t, u).sum().backward()
    assert distance(gradients_of(network), [2 * gradient for gradient in once]) <= 1e-12


def test_more_gradients_than_fit_one_bucket_are_summed(backend: str) -> None:
    with Mesh(backend=backend) as mesh:
        layers = nn.Sequential(*(nn.Linear(700, 700, bias=False) for _ in range(4)))
        model = parallel(layers, mesh)
        model(torch.full((1, 700), 1.0 + mesh.rank)).sum().backward()
        found = gradients_of(layers)
        assert same_on_all_ranks(found)
        total = sum(1.0 + rank for rank in range(mesh.size))
        serial = nn.Sequential(*(nn.Linear(700, 700, bias=False) for _ in range(4)))
        serial.load_state_dict(layers.state_dict())
        serial(torch.full((1, 700), total)).sum().backward()
        assert distance(found, gradients_of(serial)) <= 1e-5


def test_frozen_parameters_are_left_alone(split: Mesh) -> None:
    network = Network(seed=split.rank)
    network.inner.requires_grad_(False)
    model = parallel(network, split)
    model(torch.tensor(0.0), random(2, 3, seed=split.rank)).sum().backward()
    assert network.inner.grad is None
    assert same_on_all_ranks([network.inner, *gradients_of(network)])


def test_a_model_without_trainable_parameters_is_refused(split: Mesh) -> None:
    with pytest.raises(ValueError, match="Tanh has no parameter that requires a gradient"):
        parallel(nn.Tanh(), split)


def test_ranks_with_different_models_are_told_so_on_all(mesh: Mesh) -> None:
    network = Network(hidden=4 if mesh.rank == mesh.size - 1 else 5)
    if mesh.size == 1:
        assert parallel(network, mesh) is not None
        return
    with pytest.raises(ValueError, match="parameters differ in name, shape or type"):
        parallel(network, mesh)
