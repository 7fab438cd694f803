"""Arguments that an inverse problem takes and refuses, on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.inverse import Control, Dense, Diagonal, Gaussian, Inverse, ModelError, Observation, taylor_test
from tests.oracles.right_hand_sides import random


class Decay(nn.Module):
    """du/dt = -rate u + 0 frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.rate * u * self.frozen


U0 = random(3)
FLOW = Decay()
SEEN = Observation(1.0, None, torch.zeros(3, dtype=torch.float64))


def problem(
    controls: list[Control] | None = None, observations: list[Observation] | None = None, **keywords: Any
) -> Inverse:
    node = NeuralODE(FLOW, step_size=0.1, last_only=keywords.pop("last_only", False))
    return Inverse(
        node,
        [Control(U0)] if controls is None else controls,
        [SEEN] if observations is None else observations,
        **keywords,
    )


OTHER = nn.Parameter(torch.ones(3, dtype=torch.float64))
ZERO = torch.zeros(3, dtype=torch.float64)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"controls": []}, "controls: must name the initial state or parameters"),
    ({"controls": [Control([])]}, r"controls\[0\]: values: must be floating-point tensors"),
    ({"controls": [Control(torch.ones(3, dtype=torch.int64))]}, r"controls\[0\]: values: must be floating-point"),
    ({"controls": [Control(OTHER)]}, r"controls\[0\]: 1 tensors that the right-hand side does not hold"),
    ({"controls": [Control([FLOW.rate, OTHER])]}, r"controls\[0\]: values: must all be whole parameters"),
    ({"controls": [Control(FLOW.frozen)]}, r"controls\[0\]: a parameter of shape \(\) that requires no gradient"),
    (
        {"controls": [Control(U0), Control(ZERO)]},
        r"controls\[1\]: is a control already; there can be one initial state",
    ),
    ({"controls": [Control(FLOW.rate), Control(FLOW)], "u0": U0}, r"controls\[1\]: is a control already"),
    ({"controls": [Control(U0, inner_product="prior")]}, r"controls\[0\]: inner_product = 'prior'"),
    ({"controls": [Control(U0, Gaussian(0.0, "one"))]}, r"controls\[0\]: prior\.covariance = 'one': must be"),  # type: ignore[arg-type]
    ({"controls": [Control(U0, Gaussian(torch.zeros(2)))]}, r"controls\[0\]: prior\.mean: shape \(2,\)"),
    (
        {"controls": [Control(U0, Gaussian(0.0, torch.ones(2)))]},
        r"controls\[0\]: prior\.covariance: does not take \(3,\)",
    ),
    ({"controls": [Control(FLOW.rate)]}, "u0: must be given if no control is the initial state, and only then"),
    ({"u0": U0}, "u0: must be given if no control is the initial state, and only then"),
    ({"observations": []}, "observations: must hold at least one"),
    ({"observations": [Observation(-1.0, None, ZERO)]}, r"observations\[0\]: t = -1\.0: must be finite, ascending"),
    ({"observations": [Observation([1.0, 1.0], None, ZERO)]}, r"observations\[0\]: t = \[1\.0, 1\.0\]"),
    ({"observations": [Observation([1.0, 2.0], None, ZERO)]}, r"observations\[0\]: data have shape \(3,\)"),
    ({"observations": [Observation(1.0, None, ZERO, -1.0)]}, "covariance: variance = -1: must be positive"),
    ({"model_error": ModelError([1.0], 1.0)}, r"model_error: times = \[1\.0\]: must be ascending, after start = 0"),
    ({"last_only": True}, "last_only = True: must be False"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}") as refusal:
        problem(**arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("matrix", [torch.ones(2, 3), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), -torch.eye(2)])
def test_a_dense_covariance_must_be_symmetric_and_positive(matrix: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="covariance: "):
        Dense(matrix)


def test_a_variance_of_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="variance = 0: must be positive and finite"):
        Diagonal(torch.tensor([1.0, 0.0]))


def test_a_derivative_needs_an_evaluation() -> None:
    with pytest.raises(ConfigurationError, match="call J"):
        problem().derivative()


def test_gradients_of_riesz_are_those_of_the_inner_product() -> None:
    area = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = problem([Control(U0, inner_product=1 / area)])
    m = found.space.guess()
    found(m)
    gradient, along = found.derivative(riesz=True), random(3, seed=8)
    step = 1e-6
    slope = (found(m + step * found.space.pack([along])) - found(m - step * found.space.pack([along]))) / (2 * step)
    assert (torch.from_numpy(gradient.array) * area * along).sum().item() == pytest.approx(slope, rel=1e-8)


def test_a_float32_state_is_a_control_of_double_precision() -> None:
    node = NeuralODE(lambda t, u: -u, step_size=0.1)
    found = Inverse(node, [Control(U0.float())], [Observation(1.0, None, torch.zeros(3))])
    m = found.space.guess()
    assert found.space.unpack(m)[0].dtype == torch.float64
    decay = sum((-0.1) ** k / f for k, f in enumerate((1, 1, 2, 6, 24))) ** 10
    assert found(m) == pytest.approx(decay**2 * U0.square().sum().item() / 2, rel=1e-6)


def test_a_step_that_is_not_positive_is_refused_by_the_taylor_test() -> None:
    found = problem()
    with pytest.raises(ConfigurationError, match=r"first_step = 0\.0: must be positive"):
        taylor_test(found, found.space.guess(), first_step=0.0)


def test_a_taylor_test_within_rounding_says_so() -> None:
    found = problem()
    m = found.space.guess()
    tiny = 1e-12 * found.space.random(0)
    assert [failure.split(":")[1] for failure in taylor_test(found, m, tiny).failures()] == [
        " all remainders are within rounding"
    ] * 2


@pytest.mark.parametrize("keep", ["stages", "solution"])
def test_derivatives_do_not_depend_on_the_budget_of_checkpoints(keep: str) -> None:
    def derivatives(budget: Trajectory | None) -> list[Any]:
        node = NeuralODE(FLOW, step_size=0.05, trajectory=budget)
        found = Inverse(node, [Control(U0), Control(FLOW.rate)], [Observation([0.5, 1.0], None, torch.ones(2, 3))])
        found(found.space.guess())
        return [found.derivative(), found.hessian(found.space.random(1)), found.gauss_newton(found.space.random(1))]

    for kept, recomputed in zip(derivatives(None), derivatives(Trajectory(ram="300B", keep=keep)), strict=True):
        assert (kept - recomputed).norm() <= 1e-13 * kept.norm()
