"""The network of the images problem on one rank: its sizes, its solves, and the seam at which they are put in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnode_dist import Mesh, NeuralODE
from pnode_dist.problems.images.model import Bottleneck, OdeBlock, SqueezedRate, SqueezeNext, Transition
from tests.oracles.right_hand_sides import distance, random

SMALL = {"stem": 8, "widths": (4, 8), "strides": (1, 2), "features": 8, "activation": "silu"}


class Euler(nn.Module):
    """u(1) by equal Euler steps, in plain torch."""

    def __init__(self, f: nn.Module, steps: int = 1) -> None:
        super().__init__()
        self.f, self.steps = f, steps

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        for step in range(self.steps):
            u = u + self.f(torch.tensor(step / self.steps), u) / self.steps
        return u


def size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def convolution(inputs: int, outputs: int, points: int = 1, bias: int = 0) -> int:
    """Parameters of a convolution with its normalisation."""
    return (inputs * points + bias + 2) * outputs


def test_the_default_network_has_the_paper_s_number_of_parameters_in_f() -> None:
    network = SqueezeNext(3, 10, Euler)
    assert sum(size(block) for block in network.blocks) == 199_800
    layers = convolution(3, 64, 9) + convolution(256, 128) + (128 + 1) * 10
    for inputs, outputs, squeezed in ((64, 32, 16), (32, 64, 32), (64, 128, 64), (128, 256, 128)):
        layers += convolution(inputs, squeezed) + convolution(squeezed, squeezed // 2)
        layers += convolution(squeezed // 2, squeezed, 3) + convolution(squeezed, squeezed, 3)
        layers += convolution(squeezed, outputs) + convolution(inputs, outputs)
    assert size(network) == layers + 199_800 == 459_474


def test_a_right_hand_side_has_the_squeezed_convolutions_of_its_width() -> None:
    expected = (
        convolution(8, 4, bias=1) + convolution(4, 2, bias=1) + convolution(2, 4, 3, 1) + convolution(4, 4, 3, 1)
    ) + convolution(4, 8, bias=1)
    assert size(SqueezedRate(8, "silu")) == expected


@pytest.mark.parametrize("widths", [(8,), (8, 4, 16)])
def test_the_groups_halve_the_image_where_they_have_a_stride(widths: tuple[int, ...]) -> None:
    shapes: list[tuple[int, ...]] = []

    class Watched(Euler):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(u.shape))
            return super().forward(u)

    strides = (1, 2, 2)[: len(widths)]
    network = SqueezeNext(2, 5, Watched, stem=8, widths=widths, strides=strides, features=6)
    assert network(random(3, 9, 8, 2).float()).shape == (3, 5)
    points = ((9, 8), (5, 4), (3, 2))
    assert shapes == [(3, *extent, width) for extent, width in zip(points, widths, strict=False)]


def test_f_has_the_state_s_shape_and_treats_each_sample_by_itself() -> None:
    f, u = SqueezedRate(8, "silu").double(), random(3, 5, 4, 8)
    rate = f(torch.zeros(()), u)
    assert rate.shape == u.shape
    for number in range(3):
        assert distance(f(torch.zeros(()), u[number : number + 1])[0], rate[number]) <= 1e-14


def test_a_bottleneck_is_five_convolutions_written_out() -> None:
    layers = Bottleneck(8, 4, 6, "tanh", lambda features: nn.GroupNorm(1, features)).double()
    x = random(2, 8, 6, 5)
    expected = x
    named = dict(layers.named_parameters())
    for number, padding in enumerate(((0, 0), (0, 0), (0, 1), (1, 0), (0, 0))):
        weight, bias = named[f"convolutions.{number}.weight"], named[f"convolutions.{number}.bias"]
        y = torch.nn.functional.conv2d(expected, weight, bias, padding=padding)
        mean = y.mean((1, 2, 3), keepdim=True)
        y = (y - mean) / ((y - mean).square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        expected = y if number == 4 else torch.tanh(y)
    assert distance(layers(x), expected) <= 1e-13
    assert [named[f"convolutions.{number}.weight"].shape[2:] for number in range(5)] == [
        (1, 1),
        (1, 1),
        (1, 3),
        (3, 1),
        (1, 1),
    ]


@pytest.mark.parametrize(("outputs", "stride", "squeezed"), [(4, 1, 2), (4, 2, 8), (12, 1, 4)])
def test_a_transition_adds_a_shortcut_of_its_own_and_squeezes_as_the_paper_s_code(
    outputs: int, stride: int, squeezed: int
) -> None:
    layers = Transition(8, outputs, stride, "relu", nn.BatchNorm2d).double()
    x = random(2, 8, 5, 3)
    convolutions = (layers.bottleneck.convolutions[0], layers.shortcut[0])
    first, beside = (torch.nn.functional.conv2d(x, layer.weight, stride=stride) for layer in convolutions)
    with torch.no_grad():
        rest = layers.bottleneck.normalisations[0](first)
        for number in range(1, 5):
            rest = layers.bottleneck.convolutions[number](torch.relu(rest))
            rest = layers.bottleneck.normalisations[number](rest)
        expected = torch.relu(rest + layers.shortcut[1](beside))
        assert distance(layers(x), expected) <= 1e-13
    assert first.shape[1] == squeezed


def test_solves_by_neural_odes_give_the_scores_and_gradients_of_plain_euler_steps(mesh: Mesh) -> None:
    found = []
    for block in (
        lambda f: Euler(f, 3),
        lambda f: OdeBlock(NeuralODE(f, method="euler", step_size=1 / 3, last_only=True), mesh),
    ):
        torch.manual_seed(3)
        network = SqueezeNext(1, 3, block, **SMALL).double()
        images = random(4, 6, 6, 1).requires_grad_()
        scores = network(images)
        torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2, 1, 1])).backward()
        gradients = [value.grad for value in network.parameters()]
        assert all(gradient is not None for gradient in gradients)
        found.append((scores, images.grad, torch.cat([gradient.flatten() for gradient in gradients])))
    for plain, own in zip(*found, strict=True):
        assert distance(own, plain) <= 1e-12


def test_a_batch_of_another_size_is_solved_too(mesh: Mesh) -> None:
    block = OdeBlock(NeuralODE(lambda t, u: -u, method="rk4", step_size=0.25, last_only=True), mesh)
    for samples in (3, 1, 0, 3):
        u = random(samples, 2, 2, 4)
        torch.testing.assert_close(block(u), u * torch.exp(torch.tensor(-1.0)), rtol=1e-3, atol=0)
