"""The partitioned twin of a torch module computes what the module computes of the whole field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import Upsample, convert
from tests.mpi.grids import block as block_of
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
    return block_of(partition, whole.detach().movedim(1, -1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "rule"), [("zeros", "zero"), ("circular", "periodic"), ("replicate", "replicate"), ("reflect", "reflect")]
)
def test_outputs_and_gradients_are_those_of_the_module(
    mode: str, rule: str, shape: tuple[int, int], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, shape, channels=2, boundary=(rule, rule), stencil_width=2)
    check(lambda: network(mode), partition, partition, mesh)


def check(build: Callable[[], nn.Module], partition: GridPartition, output: GridPartition, mesh: Mesh) -> None:
    """Outputs, gradients and buffers of the twin of what `build` gives are those of the module, on the whole field."""
    module = build()
    whole = random(3, 2, *partition.shape).requires_grad_()
    wanted = module(whole)
    weight = random(*wanted.shape, seed=8)
    gradients_wanted = torch.autograd.grad((wanted * weight).sum(), [whole, *module.parameters()])
    statistics = {name: value.clone() for name, value in module.named_buffers()}

    twin = convert(build(), partition)
    local = block(whole, partition).clone().requires_grad_()
    found = twin(local)
    assert distance(found, block(wanted, output)) <= 1e-12
    gradients = torch.autograd.grad((found * block(weight, output)).sum(), [local, *twin.parameters()])
    assert distance(gradients[0], block(gradients_wanted[0], partition)) <= 1e-12
    by_parameters, wanted_by_parameters = (
        torch.cat([gradient.reshape(-1) for gradient in found_or_wanted[1:]])
        for found_or_wanted in (gradients, gradients_wanted)
    )
    assert distance(mesh.sum(by_parameters), wanted_by_parameters) <= 1e-12
    for name, value in twin.named_buffers():
        assert distance(value.double(), statistics[name].double()) <= 1e-12


def every_kind(shape: tuple[int, ...]) -> nn.Sequential:
    """Every kind of layer for so many axes, on a grid that becomes coarser and finer again."""
    axes = len(shape)
    torch.manual_seed(4)

    def layer(name: str, *arguments: Any, **settings: Any) -> nn.Module:
        built: nn.Module = getattr(nn, f"{name}{axes}d")(*arguments, **settings)
        return built

    return nn.Sequential(
        layer("Conv", 2, 4, 3, padding=1, padding_mode="replicate"),
        nn.LayerNorm((4, *shape)),
        nn.Mish(),
        nn.Sequential(layer("AvgPool", 2), layer("InstanceNorm", 4, affine=True), nn.Dropout(0.0)),
        layer("Conv", 4, 4, 3, padding="same", padding_mode="replicate"),
        nn.Upsample(scale_factor=2, mode={1: "linear", 2: "bilinear", 3: "trilinear"}[axes]),
        layer("BatchNorm", 4),
        layer("MaxPool", 2, stride=2),
        nn.Upsample(size=shape),
        layer("InstanceNorm", 4),
        nn.Hardswish(),
        nn.GroupNorm(2, 4),
        layer("Conv", 4, 2, 1),
    ).double()


@pytest.mark.parametrize("shape", [(26,), (6, 14), (4, 6, 10)], ids=str)
def test_the_twin_follows_the_grid_through_every_kind_of_layer(shape: tuple[int, ...], mesh: Mesh) -> None:
    partition = GridPartition(mesh, shape, channels=2, boundary="replicate", multiple_of=2)
    check(lambda: every_kind(shape), partition, partition, mesh)
    down = nn.Sequential(*list(every_kind(shape))[:5])
    check(lambda: down, partition, partition.coarsened(2), mesh)
    # Layers of this package tell on which grid they leave the field, too.
    own = nn.Sequential(Upsample(partition, 3), nn.LayerNorm((2, *(3 * n for n in shape))))
    assert convert(own, partition)[1].partition.shape == tuple(3 * n for n in shape)


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
        (
            nn.ConvTranspose2d(2, 2, 3),
            "layer '1.0': there is no twin of a ConvTranspose2d: must be one of Sequential, C",
        ),
        (Custom(), "layer '1.0': there is no twin of a Custom"),
        (nn.Conv2d(2, 2, 3, padding=1, stride=2), r"layer '1.0': stride = \(2, 2\): must be 1"),
        (nn.Conv2d(2, 2, 2, padding="same"), r"kernel_size = \(2, 2\): must be odd"),
        (nn.Conv2d(2, 2, 3), r"padding = \(0, 0\): must be \(1, 1\) or 'same'"),
        (
            nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
            r"padding_mode = 'reflect': must be the partition's rule, 'periodic' for y \(torch's name: 'circular'\)",
        ),
        (nn.Conv2d(2, 2, (1, 3), padding="same"), r"padding_mode = 'zeros': .*'replicate' for x"),
        (nn.Conv1d(2, 2, 3, padding=1), r"layer '1.0': Conv1d: is for grids of 1 axis, and this one has y, x"),
        (nn.Dropout(0.1), r"layer '1.0': p = 0.1 of Dropout: must be 0: a right-hand side"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "layer '1.0': track_running_stats = True: must be False"),
        (nn.InstanceNorm3d(2), "layer '1.0': InstanceNorm3d: is for grids of 3 axes"),
        (nn.LayerNorm((13, 17)), r"normalized_shape = \(13, 17\): must be .*\(channels, 13, 17\)"),
        (nn.LayerNorm((2, 12, 17)), r"normalized_shape = \(2, 12, 17\): must be .*\(channels, 13, 17\)"),
        (nn.MaxPool2d(2), "layer '1.0': grid: a rank owns .* which cannot be coarsened by 2"),
        (nn.MaxPool2d(3, stride=2), r"layer '1.0': stride = \(2, 2\): must be the kernel size, \(3, 3\)"),
        (nn.AvgPool2d(3, padding=1), r"layer '1.0': padding = \(1, 1\): must be 0"),
        (nn.MaxPool2d(2, dilation=2), "layer '1.0': dilation = 2: must be 1"),
        (nn.AvgPool2d(2, divisor_override=3), "layer '1.0': divisor_override = 3: must be None"),
        (nn.AvgPool3d(1), "layer '1.0': AvgPool3d: is for grids of 3 axes"),
        (nn.Upsample(scale_factor=1.5), r"layer '1.0': scale_factor = 1.5: must make whole multiples .*\(13, 17\)"),
        (nn.Upsample(size=(13, 18)), r"layer '1.0': size = \(13, 18\): must make whole multiples"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), r"mode = 'bicubic': must be 'nearest' or 'bilinear'"),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), "align_corners = True: must be False"),
        (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            r"mode = 'bilinear': must be the partition's rule, 'periodic' for y",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_has_no_twin_is_named(layer: nn.Module, message: str, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[0], channels=2, boundary=("periodic", "replicate"))
    with pytest.raises(ConfigurationError, match=message):
        convert(nn.Sequential(nn.Tanh(), nn.Sequential(layer)), partition)


def test_a_single_layer_is_a_module_too(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[0], channels=2)
    with pytest.raises(ConfigurationError, match="the module: there is no twin of a Linear"):
        convert(nn.Linear(2, 2), partition)
    twin = convert(nn.GroupNorm(1, 2), partition)
    assert twin(random(*partition.local_shape).float()).shape == partition.local_shape
