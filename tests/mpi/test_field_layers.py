"""Layers on grids of one, two and three axes compute what torch's own compute of the whole field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import pnode_dist.nn as own
from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from tests.mpi.grids import block
from tests.oracles.fields import convolved, padded
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

Function = Callable[[torch.Tensor], torch.Tensor]
SHAPES: dict[int, tuple[int, ...]] = {1: (23,), 2: (9, 13), 3: (5, 6, 7)}
# Multiples of the factors that they are coarsened by, of odd numbers of cells.
FINE: dict[int, tuple[int, ...]] = {1: (26,), 2: (6, 21), 3: (6, 10, 3)}
FACTORS: dict[int, tuple[int, ...]] = {1: (2,), 2: (2, 3), 3: (2, 2, 1)}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
CHANNELS = 4


def check(
    layer: nn.Module,
    serial: Function,
    partition: GridPartition,
    mesh: Mesh,
    parameters: list[nn.Parameter] | None = None,
    output: GridPartition | None = None,
    tangents: bool = True,
) -> None:
    """Outputs, gradients and tangents of a layer are those of a function of the whole channels-last field.

    `parameters` are those that the function has in place of the layer's, in the same order, else it has the layer's.
    """
    output = partition if output is None else output
    whole = random(2, *partition.shape, CHANNELS).requires_grad_()
    wanted = serial(whole)
    weight = random(*wanted.shape, seed=9)
    theirs = list(layer.parameters()) if parameters is None else parameters
    gradients_wanted = torch.autograd.grad((weight * wanted).sum(), [whole, *theirs])

    local = block(partition, whole.detach()).clone().requires_grad_()
    found = layer(local)
    assert distance(found, block(output, wanted)) <= 1e-12
    share = (block(output, weight) * found).sum()
    gradients = torch.autograd.grad(share, [local, *layer.parameters()])
    assert distance(gradients[0], block(partition, gradients_wanted[0])) <= 1e-12
    for gradient, total in zip(gradients[1:], gradients_wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), total) <= 1e-12

    if not tangents:
        return
    tangent = random(*whole.shape, seed=5)
    _, pushed = torch.autograd.functional.jvp(serial, whole.detach(), tangent)
    _, pushed_found = torch.func.jvp(layer, (local.detach(),), (block(partition, tangent),))
    assert distance(pushed_found, block(output, pushed)) <= 1e-12


def on_whole(layer: nn.Module) -> Function:
    """A layer of torch's as a function of a channels-last field."""
    return lambda x: layer(x.movedim(-1, 1).contiguous()).movedim(1, -1)


def randomised(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, value in enumerate(layer.parameters()):
            value.copy_(random(*value.shape, seed=number + 20))
    return layer


@pytest.mark.parametrize(
    "settings",
    [{}, {"kernel_size": (1, 3, 5), "groups": 2}, {"dilation": (1, 2, 1), "bias": False}],
    ids=["3", "1x3x5 in groups", "dilated"],
)
@pytest.mark.parametrize("boundary", [("periodic", "replicate", "zero"), ("reflect", 1.5, "periodic")], ids=str)
@pytest.mark.parametrize("axes", [1, 3])
def test_a_convolution_is_torch_s(
    axes: int, boundary: tuple[str | float, ...], settings: dict[str, Any], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS, boundary[-axes:])
    chosen = {name: value[-axes:] if isinstance(value, tuple) else value for name, value in settings.items()}
    torch.manual_seed(3)
    layer = getattr(own, f"Conv{axes}d")(partition, CHANNELS, 6, dtype=torch.float64, **chosen)
    torch.manual_seed(3)
    model = getattr(nn, f"Conv{axes}d")(CHANNELS, 6, **{"kernel_size": 3, **chosen}, dtype=torch.float64)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert torch.equal(layer.weight, model.weight)
    groups = settings.get("groups", 1)
    check(
        layer,
        lambda x: convolved(x, partition.boundary, layer.weight, layer.bias, layer.dilation, groups),
        partition,
        mesh,
    )


@pytest.mark.parametrize("axes", [1, 3])
def test_a_convolution_keeps_float32_and_the_channels_last_order(axes: int, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS)
    torch.manual_seed(3)
    layer = getattr(own, f"Conv{axes}d")(partition, CHANNELS, 6)
    whole = random(2, *partition.global_shape, dtype=torch.float32)
    with torch.no_grad():
        found = layer(block(partition, whole))
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    exact = layer.double()
    wanted = convolved(whole.double(), partition.boundary, exact.weight, exact.bias)
    assert distance(found.double(), block(partition, wanted.detach())) <= 1e-6


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_norm_is_torch_s(axes: int, groups: int, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS)
    layer = randomised(own.GroupNorm(partition, groups, CHANNELS, dtype=torch.float64))
    model = nn.GroupNorm(groups, CHANNELS, dtype=torch.float64)
    model.load_state_dict(layer.state_dict())
    check(layer, on_whole(model), partition, mesh, list(model.parameters()))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"bias": False, "eps": 1e-2}, {"elementwise_affine": False}], ids=str)
def test_a_layer_norm_over_the_whole_field_is_torch_s(axes: int, settings: dict[str, Any], mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS)
    layer = randomised(own.LayerNorm(partition, CHANNELS, dtype=torch.float64, **settings))
    model = nn.LayerNorm((*SHAPES[axes], CHANNELS), dtype=torch.float64, **settings)
    model.load_state_dict(layer.state_dict())
    check(layer, model, partition, mesh, list(model.parameters()))

    first = randomised(own.LayerNorm(partition, CHANNELS, dtype=torch.float64, channels_first=True, **settings))
    model = nn.LayerNorm((CHANNELS, *SHAPES[axes]), dtype=torch.float64, **settings)
    model.load_state_dict(first.state_dict())
    check(first, on_whole(model), partition, mesh, list(model.parameters()))


@pytest.mark.parametrize("axes", [1, 3])
def test_batch_norm_is_torch_s_and_follows_the_same_statistics(axes: int, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS)
    layer = randomised(getattr(own, f"BatchNorm{axes}d")(partition, CHANNELS, dtype=torch.float64))
    model = getattr(nn, f"BatchNorm{axes}d")(CHANNELS, dtype=torch.float64)
    model.load_state_dict(layer.state_dict())
    whole = 3 + 2 * random(2, *partition.global_shape)
    for _ in range(2):
        assert distance(layer(block(partition, whole)), block(partition, on_whole(model)(whole))) <= 1e-12
        for name, value in model.state_dict().items():
            assert distance(layer.state_dict()[name].double(), value.double()) <= 1e-12, name
    # torch.func refuses the running statistics of torch's layer too.
    check(layer, on_whole(model), partition, mesh, list(model.parameters()), tangents=False)
    layer.eval(), model.eval()
    model.load_state_dict(layer.state_dict())
    check(layer, on_whole(model), partition, mesh, list(model.parameters()))


@pytest.mark.parametrize("axes", [1, 3])
def test_the_global_mean_is_that_of_the_whole_field(axes: int, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS)
    whole = random(2, *partition.global_shape).requires_grad_()
    wanted, weight = whole.flatten(1, -2).mean(1), random(2, CHANNELS, seed=9)
    (gradient_wanted,) = torch.autograd.grad((wanted * weight).sum(), [whole])
    local = block(partition, whole.detach()).clone().requires_grad_()
    found = own.GlobalMean(partition)(local)
    assert distance(found, wanted) <= 1e-14
    (gradient,) = torch.autograd.grad((found * weight).sum() / mesh.size, [local])
    assert distance(gradient, block(partition, gradient_wanted)) <= 1e-13


@pytest.mark.parametrize("kind", ["AvgPool", "MaxPool"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_pool_is_torch_s_on_the_coarsened_grid(axes: int, kind: str, mesh: Mesh) -> None:
    partition = GridPartition(mesh, FINE[axes], CHANNELS, multiple_of=FACTORS[axes])
    layer = getattr(own, f"{kind}{axes}d")(partition, FACTORS[axes])
    model = getattr(nn, f"{kind}{axes}d")(FACTORS[axes])
    assert layer.output.shape == tuple(n // f for n, f in zip(FINE[axes], FACTORS[axes], strict=True))
    check(layer, on_whole(model), partition, mesh, output=layer.output)
    # Where values are equal, as behind a ReLU, the gradient goes where torch's goes.
    check(
        nn.Sequential(nn.ReLU(), layer), on_whole(nn.Sequential(nn.ReLU(), model)), partition, mesh, None, layer.output
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_upsampling_is_torch_s_on_the_refined_grid(axes: int, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPES[axes], CHANNELS, "replicate")
    for mode in ("nearest", LINEAR[axes]):
        for factor in (2, (3, 1, 2)[-axes:]):
            layer = own.Upsample(partition, factor, mode)
            model = nn.Upsample(scale_factor=factor, mode=mode)
            check(layer, on_whole(model), partition, mesh, output=layer.output)


@pytest.mark.parametrize("boundary", ["periodic", "reflect", "zero", 1.5])
def test_linear_interpolation_goes_by_the_partition_s_rule_beyond_the_edges(boundary: str | float, mesh: Mesh) -> None:
    partition = GridPartition(mesh, (9, 13), CHANNELS, boundary)
    layer = own.Upsample(partition, 2, "bilinear")

    def serial(x: torch.Tensor) -> torch.Tensor:
        around = padded(x, partition.boundary, (1, 1)).movedim(-1, 1)
        return functional.interpolate(around, scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2].movedim(1, -1)

    check(layer, serial, partition, mesh, output=layer.output)


def test_upsampling_has_the_same_bits_on_any_number_of_ranks(mesh: Mesh) -> None:
    from mpi4py import MPI

    whole = random(9, 13, 2)
    found = []
    for place in (mesh.state_comm, MPI.COMM_SELF):
        partition = GridPartition(place, (9, 13), 2, "replicate")
        found.append(own.Upsample(partition, 3, "bilinear")(block(partition, whole)))
    fine = GridPartition(mesh, (9, 13), 2).refined(3)
    assert torch.equal(found[0], block(fine, found[1]))


def test_a_network_of_two_grids_is_torch_s(mesh: Mesh) -> None:
    """Down and up again, with what was before added to what comes back."""
    fine = GridPartition(mesh, (12, 18), CHANNELS, "replicate", multiple_of=(2, 3))
    coarse = fine.coarsened((2, 3))
    torch.manual_seed(3)
    inside = own.Conv2d(fine, CHANNELS, 6, dtype=torch.float64)
    deep = own.Conv2d(coarse, 6, CHANNELS, dtype=torch.float64)
    layers = nn.ModuleList([inside, deep])
    down, up = own.AvgPool2d(fine, (2, 3)), own.Upsample(coarse, (2, 3), "bilinear")

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + up(torch.tanh(deep(down(inside(x)))))

    def serial(x: torch.Tensor) -> torch.Tensor:
        y = convolved(x, fine.boundary, inside.weight, inside.bias).movedim(-1, 1)
        y = functional.avg_pool2d(y, (2, 3)).movedim(1, -1)
        y = torch.tanh(convolved(y, fine.boundary, deep.weight, deep.bias)).movedim(-1, 1)
        return x + functional.interpolate(y, scale_factor=(2.0, 3.0), mode="bilinear").movedim(1, -1)

    check(Split(), serial, fine, mesh)


def test_windows_that_lie_across_blocks_are_refused_on_all_ranks(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (2 * mesh.size + 1,), CHANNELS)
    for kind in (own.AvgPool1d, own.MaxPool1d):
        with pytest.raises(ConfigurationError, match="a rank owns 3 points along x, which cannot be coarsened by 2"):
            kind(partition, 2)


@pytest.mark.parametrize("name", ["Conv", "BatchNorm", "AvgPool", "MaxPool"])
def test_a_layer_for_other_axes_is_refused(name: str, mesh: Mesh) -> None:
    arguments = {"Conv": (2, 2), "BatchNorm": (2,), "AvgPool": (1,), "MaxPool": (1,)}[name]
    for axes, shape in SHAPES.items():
        partition = GridPartition(mesh, shape, 2)
        for other in {1, 2, 3} - {axes}:
            message = rf"{name}{other}d: is for grids of {other} ax[ei]s, and this one has {', '.join('zyx'[-axes:])}"
            with pytest.raises(ConfigurationError, match=message):
                getattr(own, f"{name}{other}d")(partition, *arguments)


@pytest.mark.parametrize("mode", ["bilinear", "cubic", "trilinear"])
def test_an_interpolation_of_other_axes_is_refused(mode: str, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=f"Upsample: mode = '{mode}': must be 'nearest' or 'linear'"):
        own.Upsample(GridPartition(mesh, (8,)), 2, mode)
    with pytest.raises(ConfigurationError, match=r"factor = .*must be at least 1"):
        own.Upsample(GridPartition(mesh, (8,)), 0)


def test_a_block_of_another_grid_is_refused(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (8, 12), CHANNELS, multiple_of=2)
    coarse = partition.coarsened(2)
    local = torch.zeros(2, *partition.local_shape)
    layers = [
        own.Conv2d(coarse, CHANNELS, 2),
        own.GroupNorm(coarse, 1, CHANNELS),
        own.LayerNorm(coarse, CHANNELS),
        own.BatchNorm2d(coarse, CHANNELS),
        own.GlobalMean(coarse),
        own.AvgPool2d(coarse, 1),
        own.Upsample(coarse, 2),
    ]
    for layer in layers:
        with pytest.raises(ValueError, match=r"got shape .*, this rank owns \[\.\.\., "):
            layer(local)
    assert math.prod(coarse.local_shape) < math.prod(partition.local_shape)
