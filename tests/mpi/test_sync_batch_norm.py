"""Batch normalisation of samples on several ranks is torch's of all of them, however the ranks are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import Mesh
from pnode_dist.nn import SyncBatchNorm
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

CHANNELS = 3


def samples_of(mesh: Mesh, samples: int) -> slice:
    """Few samples for the first ranks, the rest for the last one."""
    return slice(mesh.rank, mesh.rank + 1) if mesh.rank < mesh.size - 1 else slice(mesh.size - 1, max(samples, 1))


def test_values_gradients_and_running_statistics_are_torch_s(split: Mesh) -> None:
    for samples, settings in ((7, {}), (1, {}), (7, {"momentum": None}), (7, {"affine": False})):
        check(samples, settings, split)


def check(samples: int, settings: dict[str, Any], split: Mesh) -> None:
    own = SyncBatchNorm(split, CHANNELS, dtype=torch.float64, **settings)
    model = nn.BatchNorm2d(CHANNELS, dtype=torch.float64, **settings)
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):
            value.copy_(random(*value.shape, seed=number + 5))
    own.load_state_dict(model.state_dict())
    offsets = torch.arange(CHANNELS, dtype=torch.float64).view(-1, 1, 1) * 10
    mine = samples_of(split, samples)
    for seed in (1, 2):
        whole = (random(samples, CHANNELS, 4, 5, seed=seed) + offsets).requires_grad_()
        weight = random(*whole.shape, seed=9)
        wanted = model(whole)
        wanted_gradients = torch.autograd.grad((weight * wanted).sum(), [whole, *model.parameters()])
        local = whole.detach()[mine].clone().requires_grad_()
        found = own(local)
        gradients = torch.autograd.grad((weight[mine] * found).sum(), [local, *own.parameters()])
        assert distance(found, wanted[mine]) <= 1e-12
        assert distance(gradients[0], wanted_gradients[0][mine]) <= 1e-12
        for gradient, total in zip(gradients[1:], wanted_gradients[1:], strict=True):
            assert distance(split.sum(gradient), total) <= 1e-12
        for name, value in model.state_dict().items():
            assert distance(own.state_dict()[name].double(), value.double()) <= 1e-12, name
    own.eval(), model.eval()
    assert distance(own(whole[mine]), model(whole)[mine]) <= 1e-12


def test_a_single_value_in_a_channel_is_refused_on_all_ranks(mesh: Mesh) -> None:
    layer = SyncBatchNorm(mesh, CHANNELS)
    with pytest.raises(ValueError, match=r"^SyncBatchNorm: 1 value\(s\) in a channel have no variance"):
        layer(torch.zeros(1 if mesh.is_root else 0, CHANNELS, 1, 1))
