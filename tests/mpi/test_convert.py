"""The partitioned twin of a torch module computes what the module computes of the whole field."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import convert
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

SHAPES = [(13, 17), (9, 11)]


def network(mode: str) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, padding_mode=mode),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        nn.Sequential(
            nn.Conv2d(6, 8, (1, 3), padding="same", dilation=2, groups=2, padding_mode=mode, bias=False),
            nn.BatchNorm2d(8),
            nn.Softplus(),
        ),
        nn.Conv2d(8, 2, 1),
    ).double()


def block(whole: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    (y0, y1), (x0, x1) = partition.owned
    return whole.detach().permute(0, 2, 3, 1)[..., y0:y1, x0:x1, :]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "rule"), [("zeros", "zero"), ("circular", "periodic"), ("replicate", "replicate"), ("reflect", "reflect")]
)
def test_outputs_and_gradients_are_those_of_the_module(
    mode: str, rule: str, shape: tuple[int, int], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, shape, channels=2, boundary=(rule, rule), stencil_width=2)
    module = network(mode)
    whole = random(3, 2, *shape).requires_grad_()
    wanted, weight = module(whole), random(3, 2, *shape, seed=8)
    gradients_wanted = torch.autograd.grad((wanted * weight).sum(), [whole, *module.parameters()])
    statistics = {name: value.clone() for name, value in module.named_buffers()}

    module = network(mode)
    twin = convert(module, partition)
    local = block(whole, partition).clone().requires_grad_()
    found = twin(local)
    assert distance(found, block(wanted, partition)) <= 1e-12
    gradients = torch.autograd.grad((found * block(weight, partition)).sum(), [local, *twin.parameters()])
    assert distance(gradients[0], block(gradients_wanted[0], partition)) <= 1e-12
    by_parameters, wanted_by_parameters = (
        torch.cat([gradient.reshape(-1) for gradient in found_or_wanted[1:]])
        for found_or_wanted in (gradients, gradients_wanted)
    )
    assert distance(mesh.sum(by_parameters), wanted_by_parameters) <= 1e-12
    for name, value in twin.named_buffers():
        assert distance(value.double(), statistics[name].double()) <= 1e-12


def test_parameters_are_the_same_tensors_under_the_same_names(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[0], channels=2, stencil_width=2)
    module = network("zeros").eval()
    before = torch.random.get_rng_state()
    twin = convert(module, partition)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(twin.state_dict()) == list(module.state_dict())
    for own, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        assert own is theirs
    assert not any(layer.training for layer in twin.modules())
    assert convert(twin, partition).state_dict().keys() == twin.state_dict().keys()


class Custom(nn.Module):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MaxPool2d(2), "layer '1.0' is a MaxPool2d: must be one of Sequential, Conv2d"),
        (Custom(), "layer '1.0' is a Custom"),
        (nn.Conv2d(2, 2, 3, padding=1, stride=2), r"layer '1.0': stride = \(2, 2\): must be 1"),
        (nn.Conv2d(2, 2, 2, padding="same"), r"kernel_size = \(2, 2\): must be odd"),
        (nn.Conv2d(2, 2, 3), r"padding = \(0, 0\): must be \(1, 1\) or 'same'"),
        (
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            r"padding_mode = 'reflect': must be the partition's rule, 'periodic' for y \(torch's name: 'circular'\)",
        ),
        (nn.Conv2d(2, 2, (1, 3), padding="same"), r"padding_mode = 'zeros': .*'replicate' for x"),
    ],
    ids=["pooling", "own class", "stride", "even", "padding", "rule", "one axis"],
)
def test_what_has_no_twin_is_named(layer: nn.Module, message: str, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[0], channels=2, boundary=("periodic", "replicate"))
    with pytest.raises(ConfigurationError, match=message):
        convert(nn.Sequential(nn.Tanh(), nn.Sequential(layer)), partition)


def test_a_single_layer_is_a_module_too(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[0], channels=2)
    with pytest.raises(ConfigurationError, match="the module is a Linear"):
        convert(nn.Linear(2, 2), partition)
    twin = convert(nn.GroupNorm(1, 2), partition)
    assert twin(random(*partition.local_shape).float()).shape == partition.local_shape
