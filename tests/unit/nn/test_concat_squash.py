"""The concatsquash perceptron: its formula, and its derivatives against those of autograd."""

import numpy as np
import pytest
import torch

from pnode_dist.nn.concat_squash import SMOOTH_ACTIVATIONS, ConcatSquashPerceptron
from tests.unit.problems.flows.plain_flows import jacobians, velocity

SAMPLES = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3)))
DIRECTIONS = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 5, 3)))
NOW = torch.tensor(0.3, dtype=torch.float64)


def perceptron(activation: str = "tanh") -> ConcatSquashPerceptron:
    torch.manual_seed(0)
    return ConcatSquashPerceptron((3, 6, 5, 4), activation)


@pytest.mark.parametrize("activation", SMOOTH_ACTIVATIONS)
def test_output_and_derivatives_are_those_of_the_formula_and_of_autograd(activation: str) -> None:
    network = perceptron(activation)
    parameters = dict(network.named_parameters())
    expected = velocity(parameters, activation, 0.3, SAMPLES)
    torch.testing.assert_close(network(NOW, SAMPLES), expected, rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        output, derivatives = network.with_tangents(NOW, SAMPLES, DIRECTIONS)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-14)
    full = jacobians(lambda t, x: velocity(parameters, activation, t, x), 0.3, SAMPLES)
    expected = torch.einsum("nij,knj->kni", full, DIRECTIONS)
    torch.testing.assert_close(derivatives, expected, rtol=1e-12, atol=1e-14)


def test_directions_that_samples_share_are_the_columns_of_the_jacobian() -> None:
    network = perceptron()
    basis = torch.eye(3, dtype=torch.float64).unsqueeze(1)
    _, derivatives = network.with_tangents(NOW, SAMPLES, basis)
    full = jacobians(lambda t, x: network(torch.tensor(t, dtype=torch.float64), x), 0.3, SAMPLES)
    torch.testing.assert_close(derivatives, full.permute(2, 0, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", SMOOTH_ACTIVATIONS)
def test_derivatives_can_be_differentiated_twice(activation: str) -> None:
    network = perceptron(activation)

    def derivative(x: torch.Tensor) -> torch.Tensor:
        return network.with_tangents(NOW, x, DIRECTIONS[:1])[1]

    point = SAMPLES.clone().requires_grad_()
    assert torch.autograd.gradcheck(derivative, (point,))  # type: ignore[no-untyped-call]
    assert torch.autograd.gradgradcheck(derivative, (point,))  # type: ignore[no-untyped-call]


def test_the_last_layer_can_start_small() -> None:
    torch.manual_seed(0)
    small = ConcatSquashPerceptron((3, 6, 5, 4), "tanh", 0.5)
    for (name, value), whole in zip(small.named_parameters(), perceptron().parameters(), strict=True):
        factor = 0.5 if name.startswith("layers.2") else 1.0
        torch.testing.assert_close(value, factor * whole, rtol=0, atol=0)
