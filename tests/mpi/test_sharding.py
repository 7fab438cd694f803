"""Layers whose weights are split over the state ranks compute, learn and are saved as torch's whole ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import DensePartition, Mesh, NeuralODE
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.config.tables import TrainingConfig
from pnode_dist.distributed.gradients import clip_gradient_norm, parallel
from pnode_dist.distributed.sharding import gather_state_dict, load_whole_state_dict, shards_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import Linear
from pnode_dist.nn import linear as linear_module
from pnode_dist.runs import directory as run_directory
from pnode_dist.train import loop
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES, STEP, STATE = [0.0, 1.0], 0.25, 7
# Of 3 entries a fourth rank has none.
SIZES = [(7, 10), (10, 7), (3, 5), (5, 3)]


class Coupled(nn.Module):
    """du/dt = W2 tanh(W1 u + b1) + b2, and with `mixed` times one number that all ranks hold."""

    def __init__(self, place: Mesh | MPI.Comm, mixed: bool, shard: bool, hidden: int = 11) -> None:
        super().__init__()
        self.partition, inner = DensePartition(place, STATE), DensePartition(place, hidden)
        torch.manual_seed(2)
        self.first = Linear(self.partition, inner, dtype=torch.float64, shard=shard)
        self.second = Linear(inner, self.partition, dtype=torch.float64, shard=shard)
        self.scale = nn.Parameter(torch.tensor([0.7], dtype=torch.float64)) if mixed else None

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        tendency: torch.Tensor = self.second(torch.tanh(self.first(u)))
        return tendency if self.scale is None else self.scale * tendency


class Plain(nn.Module):
    """The same in torch, for whole vectors."""

    def __init__(self, mixed: bool, hidden: int = 11) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(STATE, hidden, dtype=torch.float64)
        self.second = nn.Linear(hidden, STATE, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor([0.7], dtype=torch.float64)) if mixed else None

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        tendency: torch.Tensor = self.second(torch.tanh(self.first(u)))
        return tendency if self.scale is None else self.scale * tendency


def part(whole: torch.Tensor, name: str, module: nn.Module) -> torch.Tensor:
    shards = shards_of(module)
    return shards[name].part_of(whole) if name in shards else whole


def batch(replica: int) -> torch.Tensor:
    return random(3, STATE, seed=20 + replica)


def backward(model: nn.Module, partition: DensePartition, replica: int) -> None:
    torch.sin(model(batch(replica)[:, slice(*partition.owned)], TIMES)[-1]).sum().backward()


def plain_gradients(plain: Plain, replicas: int) -> dict[str, torch.Tensor]:
    """The mean over the replicas."""
    losses = [
        torch.sin(odeint_plain(plain, batch(replica), TIMES, TABLEAUX["4"], STEP)[-1]).sum()
        for replica in range(replicas)
    ]
    named = dict(plain.named_parameters())
    return dict(zip(named, torch.autograd.grad(torch.stack(losses).mean(), list(named.values())), strict=True))


def check_gradients(found: nn.Module, wanted: dict[str, torch.Tensor], times: float = 1.0) -> None:
    for name, value in found.named_parameters():
        assert value.grad is not None
        assert distance(value.grad, times * part(wanted[name], name, found)) <= 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_rank_s_part_of_layer_and_gradient_is_torch_s(
    sizes: tuple[int, int], kind: Any, bias: bool, comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_DRAWN_AT_ONCE", 2 * sizes[0])
    inputs, outputs = (DensePartition(comm, size) for size in sizes)
    torch.manual_seed(1)
    model = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    own = Linear(inputs, outputs, bias, torch.float64, kind, shard=True)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.named_parameters():
        assert torch.equal(own.get_parameter(name), part(value, name, own))
    held = outputs.local_shape[0] * sizes[0] if kind == "column" else sizes[1] * inputs.local_shape[0]
    assert own.weight.numel() == held

    whole, weight = random(4, sizes[0]).requires_grad_(), random(4, sizes[1], seed=3)
    (model(whole) * weight).sum().backward()
    local = whole.detach()[:, slice(*inputs.owned)].clone().requires_grad_()
    found = own(local)
    assert distance(found, model(whole)[:, slice(*outputs.owned)]) <= 1e-12
    (found * weight[:, slice(*outputs.owned)]).sum().backward()
    assert distance(local.grad, whole.grad[:, slice(*inputs.owned)]) <= 1e-12  # type: ignore[index]
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert distance(own.get_parameter(name).grad, part(value.grad, name, own)) <= 1e-12


@pytest.mark.parametrize("mixed", [False, True], ids=["all sharded", "mixed"])
@pytest.mark.parametrize("hidden", [11, 3])
def test_gradients_on_a_mesh_are_parts_of_those_of_one_process(hidden: int, mixed: bool, split: Mesh) -> None:
    func = Coupled(split, mixed, True, hidden)
    if split.replica > 0:
        with torch.no_grad():
            func.first.weight.mul_(2.0)  # parameters come from the first replica
    model = parallel(NeuralODE(func, step_size=STEP, partition=func.partition), split)
    wanted = plain_gradients(Plain(mixed, hidden), split.data_replicas)
    backward(model, func.partition, split.replica)
    check_gradients(func, wanted)
    backward(model, func.partition, split.replica)
    check_gradients(func, wanted, 2.0)
    with model.no_sync():
        backward(model, func.partition, split.replica)
    backward(model, func.partition, split.replica)
    check_gradients(func, wanted, 4.0)
    for name, value in func.named_parameters():
        total = split.sum(value.grad, over="data") / split.data_replicas  # type: ignore[arg-type]
        assert distance(value.grad, total) <= 1e-15, name


@pytest.mark.parametrize("limit", [0.01, math.inf])
def test_the_norm_that_gradients_are_clipped_to_is_that_of_the_whole_gradient(limit: float, split: Mesh) -> None:
    func, plain = Coupled(split, True, True), Plain(True)
    model = parallel(NeuralODE(func, step_size=STEP, partition=func.partition), split)
    backward(model, func.partition, split.replica)
    wanted = plain_gradients(plain, split.data_replicas)
    for name, value in plain.named_parameters():
        value.grad = wanted[name]
    norm = nn.utils.clip_grad_norm_(plain.parameters(), limit)
    found = clip_gradient_norm(model, limit, split)
    assert distance(found, norm) <= 1e-12
    check_gradients(func, {name: value.grad for name, value in plain.named_parameters() if value.grad is not None})


def test_state_dicts_of_whole_tensors_go_either_way(split: Mesh) -> None:
    func, plain = Coupled(split, True, True), Plain(True)
    whole = gather_state_dict(func, split)
    assert (whole is not None) == (split.state_rank == 0)
    if whole is not None:
        assert whole.keys() == plain.state_dict().keys()
        assert all(torch.equal(whole[name], value) for name, value in plain.state_dict().items())
    with torch.no_grad():
        for value in plain.parameters():
            value.mul_(3.0)
    load_whole_state_dict(func, plain.state_dict())
    for name, value in plain.named_parameters():
        assert torch.equal(func.get_parameter(name), part(value, name, func))


def test_whole_tensors_of_another_size_are_refused(comm: MPI.Comm) -> None:
    func = Coupled(comm, False, True)
    state = Plain(False, hidden=12).state_dict()
    with pytest.raises(ConfigurationError, match=r"^first.weight has shape \(12, 7\): must be \(11, 7\), that of"):
        load_whole_state_dict(func, state)


@dataclass
class Fitting:
    """A problem of the training loop: two batches for each replica, towards a fixed target."""

    mesh: Mesh
    func: Coupled
    name: str = "fitting"
    units: str = ""
    model: NeuralODE = field(init=False)

    def __post_init__(self) -> None:
        self.model = NeuralODE(self.func, step_size=STEP, partition=self.func.partition)

    def batches(self, epoch: int, done: int = 0) -> Iterator[torch.Tensor]:
        for number in range(done, 2):
            yield random(3, STATE, seed=10 * epoch + 2 * self.mesh.replica + number)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        final: torch.Tensor = model(batch[:, slice(*self.func.partition.owned)], TIMES)[-1]
        return (final - 1.0).square().sum()

    def validation(self, model: nn.Module) -> dict[str, float]:
        return {"error": float(self.mesh.sum(self.loss(model, random(3, STATE)), over="state"))}

    def solve_statistics(self) -> SolveStatistics:
        return self.model.last_solve


@pytest.mark.parametrize("mixed", [False, True], ids=["all sharded", "mixed"])
def test_a_training_is_that_of_weights_that_all_ranks_hold_and_saves_whole_ones(mixed: bool, directory: Path) -> None:
    training = TrainingConfig(epochs=2, learning_rate=0.05, dtype="float64", gradient_clip=0.5, keep="best")
    size = MPI.COMM_WORLD.size
    with Mesh(data=2 if size == 4 else 1) as mesh:
        saved = {}
        for shard in (True, False):
            func = Coupled(mesh, mixed, shard)
            target = directory / str(shard)
            if mesh.is_root:
                target.mkdir()
            mesh.barrier()
            problem: Any = Fitting(mesh, func)
            loop.train(problem, training, mesh, target)
            saved[shard] = torch.load(target / run_directory.MODEL, weights_only=True)
            again: Any = Fitting(mesh, Coupled(mesh, mixed, shard))
            run_directory.load_parameters(again.model, target / run_directory.MODEL)
            assert all(
                torch.equal(mine, theirs)
                for mine, theirs in zip(again.func.parameters(), func.parameters(), strict=True)
            )
        assert saved[True].keys() == saved[False].keys()
        for name, value in saved[False].items():
            assert not torch.equal(value, dict(Plain(mixed).named_parameters())[name.removeprefix("func.")])
            assert distance(saved[True][name], value) <= 1e-9
