"""torch's DTensor, fully_shard and distributed checkpoints on a Mesh compute and save what plain torch does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn

from pnode_dist import ConfigurationError, Mesh
from tests import torch_releases
from tests.mpi.conftest import SPLITS
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank


@pytest.fixture(params=["mpi", pytest.param("gloo", marks=pytest.mark.nightly)], ids=lambda name: f"backend {name}")
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with Mesh(backend=request.param, timeout=60) as mesh:
        yield mesh


def network() -> nn.Sequential:
    """Layers of sizes that the ranks do not divide."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(rank: int) -> torch.Tensor:
    return random(4, 5, seed=10 + rank)


def plain_gradients(model: nn.Module) -> list[torch.Tensor]:
    """The mean over the ranks' batches."""
    loss = sum(model(batch(rank)).square().sum() for rank in range(SIZE)) / SIZE
    return list(torch.autograd.grad(loss, list(model.parameters())))  # type: ignore[arg-type]


def fully_sharded(mesh: Mesh, dimension: str | None = "state") -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    model = network()
    place = mesh.device_mesh[dimension] if dimension else mesh.device_mesh
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=place)
    return model


def whole(values: Any) -> torch.Tensor:
    found: torch.Tensor = values.full_tensor()
    return found


def test_the_device_mesh_has_the_groups_of_the_mesh(split: Mesh) -> None:
    found = split.device_mesh
    assert found is split.device_mesh
    assert found.mesh_dim_names == ("replica", "state")
    assert found.mesh.shape == (split.data_replicas, split.state_ranks)
    assert tuple(found.get_coordinate() or ()) == (split.replica, split.state_rank)
    assert found.get_group("state") is split.state_group
    assert found["replica"].get_group() is split.data_group


def test_a_closed_mesh_has_no_device_mesh() -> None:
    mesh = Mesh()
    mesh.close()
    with pytest.raises(ConfigurationError, match="a closed mesh has no device_mesh"):
        _ = mesh.device_mesh


def test_dtensors_are_redistributed_and_multiplied_as_whole_ones(mesh: Mesh) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    place = mesh.device_mesh["state"]
    x, y = random(5, 4).requires_grad_(), random(4, 3, seed=2)
    rows = distribute_tensor(x.detach(), place, [Shard(0)]).requires_grad_()
    assert torch.equal(whole(rows.redistribute(place, [Shard(1)])), x)
    assert torch.equal(rows.redistribute(place, [Replicate()]).to_local(), x)
    product = rows.redistribute(place, [Shard(1)]) @ distribute_tensor(y, place, [Shard(0)])
    assert distance(whole(product), x @ y) <= 1e-12
    whole(product).square().sum().backward()
    (x @ y).square().sum().backward()
    assert rows.grad is not None
    assert x.grad is not None
    assert distance(whole(rows.grad), x.grad) <= 1e-12


@torch_releases.fully_sharding_on_a_cpu
def test_fully_sharded_models_learn_what_one_process_does(mesh: Mesh) -> None:
    model, plain = fully_sharded(mesh), network()
    optimisers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    for _ in range(2):
        for optimiser in optimisers:
            optimiser.zero_grad()
        for parameter, gradient in zip(plain.parameters(), plain_gradients(plain), strict=True):
            parameter.grad = gradient
        model(batch(RANK)).square().sum().backward()
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            assert wanted.grad is not None
            assert distance(whole(found.grad), wanted.grad) <= 1e-12
        for optimiser in optimisers:
            optimiser.step()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert distance(whole(found), wanted) <= 1e-12


@torch_releases.fully_sharding_on_a_cpu
@pytest.mark.parametrize(("state", "data"), SPLITS)
def test_replicas_of_fully_sharded_models_have_the_mean_gradient(state: int, data: int) -> None:
    with Mesh(state, data) as mesh:
        model, plain = fully_sharded(mesh, None), network()
        model(batch(RANK)).square().sum().backward()
        for found, wanted in zip(model.parameters(), plain_gradients(plain), strict=True):
            assert distance(whole(found.grad), wanted) <= 1e-12


@torch_releases.fully_sharding_on_a_cpu
def test_single_precision_takes_torch_s_own_mean_and_scaled_sum(mesh: Mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for factor in (None, 3.0):
        model, plain = network().float(), network().float()
        fully_shard(model, mesh=mesh.device_mesh["state"])
        if factor is not None and mesh.backend == "mpi":
            set_factor = getattr(model, "set_gradient_divide_factor", None) or model.set_reduce_scatter_divide_factor
            set_factor(factor)
        elif factor is not None or mesh.backend == "gloo":
            return  # gloo reduces with neither
        model(batch(RANK).float()).square().sum().backward()
        loss = sum(plain(batch(rank).float()).square().sum() for rank in range(SIZE)) / (factor or SIZE)
        loss.backward()  # type: ignore[union-attr]
        for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            assert wanted.grad is not None
            assert distance(whole(found.grad), wanted.grad) <= 1e-5


@pytest.mark.parametrize("asynchronous", [False, True], ids=["saved", "saved in the background"])
def test_checkpoints_are_loaded_into_another_sharding(asynchronous: bool, mesh: Mesh, directory: Path) -> None:
    import torch.distributed.checkpoint as checkpoints
    from torch.distributed.tensor import Shard, distribute_tensor

    model = fully_sharded(mesh)
    state = {"model": model.state_dict(), "step": torch.tensor(7)}
    wanted = {name: whole(value).clone() for name, value in model.state_dict().items()}
    if asynchronous:
        pending = checkpoints.async_save(state, checkpoint_id=directory / "kept")
        # Collectives of this thread while the other one saves.
        for _ in range(20):
            assert mesh.sum(torch.ones(3)).tolist() == [SIZE] * 3
        pending.result()
    else:
        checkpoints.save(state, checkpoint_id=directory / "kept")
    place = mesh.device_mesh["state"]
    columns = {
        name: distribute_tensor(torch.zeros_like(value), place, [Shard(value.dim() - 1)])
        for name, value in wanted.items()
    }
    loaded = {"model": columns, "step": torch.tensor(0)}
    checkpoints.load(loaded, checkpoint_id=directory / "kept")
    assert loaded["step"] == 7
    assert all(torch.equal(whole(columns[name]), value) for name, value in wanted.items())
    unsharded = {"model": {name: torch.zeros_like(value) for name, value in wanted.items()}}
    checkpoints.load(unsharded, checkpoint_id=directory / "kept")
    assert all(torch.equal(unsharded["model"][name], value) for name, value in wanted.items())


def test_torch_s_data_parallel_wrapper_sums_over_the_group(mesh: Mesh) -> None:
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(network()), process_group=mesh.world_group)
    model(batch(RANK)).square().sum().backward()
    for found, wanted in zip(model.parameters(), plain_gradients(network()), strict=True):
        assert found.grad is not None
        assert distance(found.grad, wanted) <= 1e-12


@pytest.mark.nightly
def test_communicators_of_torch_s_own_groups_end_with_the_mesh() -> None:
    # MPI has about two thousand communicators to give.
    for _ in range(500 if SIZE == 2 else 3):
        with Mesh():
            for _ in range(5):
                dist.new_group(list(range(SIZE)))
