"""Layers on one wide halo compute what they compute with a halo each, and what torch computes of the whole field."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import Conv1d, Conv2d, Conv3d, GroupNorm, Stack, convert
from pnode_dist.nn import conv as conv_module
from pnode_dist.nn import stack as stack_module
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

RULES: tuple[str | float, ...] = ("periodic", "replicate", "reflect", "zero", 1.5)
# Each rule beside itself and beside the next: all of them, in y and in x, at corners of equal and of other rules.
PAIRS = [pair for pair in product(RULES, RULES) if (RULES.index(pair[1]) - RULES.index(pair[0])) % 5 <= 1]
SHAPE = (17, 19)
# Three stencils: 1 + 2 + 1 points in y and 1 + 2 + 0 in x.
LAYERS: list[dict[str, Any]] = [{}, {"dilation": 2}, {"kernel_size": (3, 1), "groups": 2}]


def stack(partition: GridPartition, exchange: Any) -> Stack:
    torch.manual_seed(3)
    first, second, third = (
        Conv2d(partition, before, after, dtype=torch.float64, **settings)
        for before, after, settings in zip((2, 4, 4), (4, 4, 2), LAYERS, strict=True)
    )
    return Stack(partition, first, nn.Sequential(nn.Tanh(), second, nn.SiLU()), third, exchange=exchange)


def plain(whole: torch.Tensor, layers: Stack) -> torch.Tensor:
    """The same of a whole field: every layer's input is padded by the rules."""
    for layer in layers.layers:
        if isinstance(layer, Conv1d | Conv2d | Conv3d):
            rules = layer.partition.boundary
            whole = convolved(whole, rules, layer.weight, layer.bias, layer.dilation, layer.groups)
        else:
            whole = layer(whole)
    return whole


def block(whole: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    return whole.detach()[(..., *(slice(*owned) for owned in partition.owned), slice(None))]


@pytest.mark.parametrize("boundary", PAIRS, ids=str)
def test_outputs_and_gradients_are_torch_s_whichever_way_halos_are_exchanged(
    boundary: tuple[str | float, str | float], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPE, 2, boundary, stencil_width=4)
    whole = random(3, *SHAPE, 2).requires_grad_()
    weight = random(3, *SHAPE, 2, seed=9)
    layers = stack(partition, "layer")
    serial = plain(whole, layers)
    wanted = torch.autograd.grad((weight * serial).sum(), [whole, *layers.parameters()])
    for exchange in ("layer", "once", "auto"):
        layers = stack(partition, exchange)
        local = block(whole, partition).clone().requires_grad_()
        found = layers(local)
        assert distance(found, block(serial, partition)) <= 1e-12
        gradients = torch.autograd.grad((block(weight, partition) * found).sum(), [local, *layers.parameters()])
        assert distance(gradients[0], block(wanted[0], partition)) <= 1e-12
        for gradient, total in zip(gradients[1:], wanted[1:], strict=True):
            assert distance(mesh.sum(gradient), total) <= 1e-12


@pytest.mark.parametrize(("shape", "kind"), [((23,), Conv1d), ((9, 11, 7), Conv3d)], ids=["line", "space"])
def test_lines_and_three_axes_have_one_wide_halo_as_well(shape: tuple[int, ...], kind: Any, mesh: Mesh) -> None:
    partition = GridPartition(mesh, shape, 1, ("periodic", "reflect", "replicate")[-len(shape) :], stencil_width=2)
    torch.manual_seed(3)
    convolutions = [kind(partition, 1, 3, dtype=torch.float64), kind(partition, 3, 1, dtype=torch.float64)]
    layers = Stack(partition, convolutions[0], nn.GELU(), convolutions[1], exchange="once")
    whole = random(2, *shape, 1)
    assert distance(layers(block(whole, partition)), block(plain(whole, layers), partition)) <= 1e-12


def test_once_is_one_exchange_and_layer_is_one_for_each_convolution(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"halo": 0, "neighbour_halo": 0}

    def counted(module: Any, name: str) -> None:
        exchange = getattr(module, name)

        def count(*arguments: Any) -> Any:
            counts[name] += 1
            return exchange(*arguments)

        monkeypatch.setattr(module, name, count)

    counted(conv_module, "halo")
    counted(stack_module, "neighbour_halo")
    partition = GridPartition(mesh, SHAPE, 2, "periodic", stencil_width=4)
    stack(partition, "once")(torch.ones(partition.local_shape, dtype=torch.float64))
    assert counts == {"halo": 0, "neighbour_halo": 1}
    stack(partition, "layer")(torch.ones(partition.local_shape, dtype=torch.float64))
    assert counts == {"halo": 3, "neighbour_halo": 1}


def test_what_is_cheaper_is_measured_once_and_chosen_alike_on_all_ranks(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = GridPartition(mesh, SHAPE, 2, "periodic", stencil_width=4)
    local = torch.ones(2, *partition.local_shape, dtype=torch.float64)
    measured = []
    monkeypatch.setattr(stack_module, "seconds_apart", lambda *_: measured.append("apart") or 1.0)
    # One rank alone finds a wide halo more expensive.
    for last, wanted in ((0.5, True), (2.0, False)):
        layers = stack(partition, "auto")
        seconds = last if partition.comm.rank == partition.comm.size - 1 else 0.5
        monkeypatch.setattr(stack_module, "seconds_at_once", lambda *_, seconds=seconds: seconds)
        measured.clear()
        for _ in range(3):
            layers(local)
        assert layers._at_once(local) == (wanted and mesh.size > 1)
        assert len(measured) == (mesh.size > 1)
        layers(local[:1])
        assert len(measured) == 2 * (mesh.size > 1)


def test_a_solve_on_one_halo_a_stage_has_the_gradient_of_one_a_layer(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, 2, ("reflect", "periodic"), stencil_width=4)
    found = []
    for exchange in ("layer", "once"):
        layers = stack(partition, exchange)
        node = NeuralODE(lambda t, u, layers=layers: layers(u), step_size=0.5, partition=partition)
        u0 = block(random(*SHAPE, 2), partition).clone().requires_grad_()
        node(u0, [0.0, 1.0])[-1].square().sum().backward()
        assert u0.grad is not None
        # What a rank computes again of its neighbours' adds to its share of the parameters' gradients.
        found.append([u0.grad, *(mesh.sum(value.grad) for value in layers.parameters() if value.grad is not None)])
    assert distance(found[1], found[0]) <= 1e-12


def test_a_converted_module_keeps_its_names_and_numbers(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, 2, "zero", stencil_width=2)
    torch.manual_seed(4)
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).double()
    layers = Stack(partition, *convert(module, partition), exchange="once")  # type: ignore[misc]
    assert layers.state_dict().keys() == module.state_dict().keys()
    whole = random(1, *SHAPE, 2)
    wanted = module(whole.movedim(-1, 1)).movedim(1, -1)
    assert distance(layers(block(whole, partition)), block(wanted, partition)) <= 1e-12
    assert convert(layers, partition) is layers


def test_what_a_wide_halo_cannot_serve_is_refused(comm: MPI.Comm) -> None:
    partition = GridPartition(comm, (3, 3 * comm.size), 2, "zero", 1, processes=(1, comm.size))
    convolutions = [Conv2d(partition, 2, 2) for _ in range(4)]
    with pytest.raises(ConfigurationError, match=r"needs a halo of \(4, 4\): must be at most .* has, \(3, 3\)"):
        Stack(partition, *convolutions, exchange="once")
    too_small = Stack(partition, *convolutions, exchange="auto")
    assert too_small(torch.ones(partition.local_shape)).shape == partition.local_shape
    with pytest.raises(ConfigurationError, match=r"layer '1\.0' is a GroupNorm: must be one of Conv1d, Conv2d, Conv3d"):
        Stack(partition, convolutions[0], nn.Sequential(GroupNorm(partition, 1, 2)))
    other = GridPartition(comm, (6, 6 * comm.size), 2, "zero", 1, processes=(1, comm.size))
    with pytest.raises(ConfigurationError, match=r"layer '0' is a Conv2d: must be one of .* on the stack's grid"):
        Stack(partition, Conv2d(other, 2, 2))
    with pytest.raises(ConfigurationError, match="exchange = 'twice': must be one of layer, once, auto"):
        Stack(partition, exchange="twice")  # type: ignore[arg-type]
