"""Normalisation of a field split over ranks is torch's normalisation of the whole field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.nn import BatchNorm2d, Conv2d, GlobalMean, GroupNorm
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

SHAPE, CHANNELS = (13, 17), 6


@pytest.fixture(scope="module")
def partition(mesh: Mesh) -> GridPartition:
    return GridPartition(mesh, SHAPE, channels=CHANNELS)


def field(*leading: int) -> torch.Tensor:
    """Channels of different means and widths, the means up to 250 widths: so many times rounding errors grow."""
    offsets = torch.arange(CHANNELS, dtype=torch.float64) * 10.0
    return (random(*leading, *SHAPE, CHANNELS) * torch.logspace(-2, 1, CHANNELS, dtype=torch.float64) + offsets).clone()


def block(whole: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    (y0, y1), (x0, x1) = partition.owned
    return whole.detach()[..., y0:y1, x0:x1, :]


def serial(layer: nn.Module, whole: torch.Tensor) -> torch.Tensor:
    """A layer of torch's on a channels-last field, given in the order in which torch sums it more exactly."""
    found: torch.Tensor = layer(whole.reshape(-1, *whole.shape[-3:]).permute(0, 3, 1, 2).contiguous())
    return found.permute(0, 2, 3, 1).reshape(whole.shape)


def randomised(layer: nn.Module) -> list[torch.Tensor]:
    parameters = list(layer.parameters())
    with torch.no_grad():
        for number, value in enumerate(parameters):
            value.copy_(random(*value.shape, seed=number + 5))
    return parameters


def check(
    own: nn.Module, model: nn.Module, partition: GridPartition, mesh: Mesh, leading: Sequence[int], tolerance: float
) -> None:
    model.load_state_dict(own.state_dict())
    whole = field(*leading).requires_grad_()
    wanted, weight = serial(model, whole), random(*whole.shape, seed=9)
    gradients_wanted = torch.autograd.grad((weight * wanted).sum(), [whole, *model.parameters()])
    local = block(whole, partition).clone().requires_grad_()
    found = own(local)
    assert distance(found, block(wanted, partition)) <= tolerance
    share = (block(weight, partition) * found).sum()
    gradients = torch.autograd.grad(share, [local, *own.parameters()])
    assert distance(gradients[0], block(gradients_wanted[0], partition)) <= tolerance
    for gradient, total in zip(gradients[1:], gradients_wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), total) <= tolerance


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("leading", [(1,), (2, 3)], ids=["one sample", "samples"])
def test_group_norm_is_torch_s(groups: int, leading: tuple[int, ...], partition: GridPartition, mesh: Mesh) -> None:
    own = GroupNorm(partition, groups, CHANNELS, dtype=torch.float64)
    randomised(own)
    check(own, nn.GroupNorm(groups, CHANNELS, dtype=torch.float64), partition, mesh, leading, 1e-12)


def test_a_field_without_batch_axes_is_one_sample(partition: GridPartition) -> None:
    own = GroupNorm(partition, 2, CHANNELS, dtype=torch.float64)
    local = block(field(), partition)
    assert torch.equal(own(local), own(local[None])[0])


@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"eps": 1e-2, "affine": False}], ids=str)
def test_batch_norm_is_torch_s_and_follows_the_same_statistics(
    settings: dict[str, Any], partition: GridPartition, mesh: Mesh
) -> None:
    own = BatchNorm2d(partition, CHANNELS, dtype=torch.float64, **settings)
    randomised(own)
    model = nn.BatchNorm2d(CHANNELS, dtype=torch.float64, **settings)
    for _ in range(2):
        check(own, model, partition, mesh, (2, 3), 1e-12)
        for name, value in model.state_dict().items():
            assert distance(own.state_dict()[name].double(), value.double()) <= 1e-12, name
    own.eval(), model.eval()
    whole = field(4)
    assert distance(own(block(whole, partition)), block(serial(model, whole), partition)) <= 1e-12


def test_batch_norm_that_tracks_nothing_uses_the_batch_in_evaluation_too(partition: GridPartition) -> None:
    own = BatchNorm2d(partition, CHANNELS, track_running_stats=False, dtype=torch.float64).eval()
    model = nn.BatchNorm2d(CHANNELS, track_running_stats=False, dtype=torch.float64).eval()
    whole = random(2, *SHAPE, CHANNELS)
    assert distance(own(block(whole, partition)), block(serial(model, whole), partition)) <= 1e-12


def test_the_global_mean_and_its_gradient_are_those_of_the_whole_field(partition: GridPartition, mesh: Mesh) -> None:
    whole = field(2).requires_grad_()
    wanted, weight = whole.mean((-3, -2)), random(2, CHANNELS, seed=9)
    (gradient_wanted,) = torch.autograd.grad((wanted * weight).sum(), [whole])
    local = block(whole, partition).clone().requires_grad_()
    found = GlobalMean(partition)(local)
    assert distance(found, wanted) <= 1e-14
    (gradient,) = torch.autograd.grad((found * weight).sum() / partition.comm.size, [local])
    assert distance(gradient, block(gradient_wanted, partition)) <= 1e-13


def test_the_gradient_of_a_solve_with_normalised_layers_is_that_on_one_rank(
    partition: GridPartition, mesh: Mesh
) -> None:
    class Normalised(nn.Module):
        def __init__(self, partition: GridPartition) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.inner = Conv2d(partition, CHANNELS, 8, dtype=torch.float64)
            self.norm = GroupNorm(partition, 2, 8, dtype=torch.float64)
            self.outer = Conv2d(partition, 8, CHANNELS, dtype=torch.float64)
            self.mean = GlobalMean(partition)

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return self.outer(torch.tanh(self.norm(self.inner(u)))) - 0.1 * self.mean(u)

    from mpi4py import MPI

    whole = random(*SHAPE, CHANNELS)
    gradients = []
    for part in (partition, GridPartition(MPI.COMM_SELF, SHAPE, channels=CHANNELS)):
        func = Normalised(part)
        node = NeuralODE(func, step_size=0.25, partition=part, trajectory=Trajectory(ram_slots=2))
        local = block(whole, part).clone().requires_grad_()
        loss = node(local, [0.0, 1.0])[-1].square().sum()
        gradients.append(torch.autograd.grad(loss, [local, *func.parameters()]))
    assert distance(gradients[0][0], block(gradients[1][0], partition)) <= 1e-12
    for found, wanted in zip(gradients[0][1:], gradients[1][1:], strict=True):
        assert distance(mesh.sum(found), wanted) <= 1e-12
