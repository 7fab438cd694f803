"""The learnt force and the constrained motion: those of plain torch, with an index of 1."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pnode_dist.problems.pendulum.config import PendulumModelConfig
from pnode_dist.problems.pendulum.model import ConstrainedMotion, TrueForce, mass_matrix, right_hand_side
from tests.unit.problems.pendulum.plain_pendulum import PARAMETERS, applied_force, eliminated, learnt_force

SCALES = SimpleNamespace(
    mean=torch.tensor([0.1, -0.5, 0.2, -0.1, 9.0], dtype=torch.float64),
    deviation=torch.tensor([0.5, 0.3, 1.2, 0.9, 4.0], dtype=torch.float64),
    force_mean=torch.tensor([0.3, -9.0], dtype=torch.float64),
    force_deviation=torch.tensor([0.7, 0.6], dtype=torch.float64),
)
STATES = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 5)))
NOW = torch.zeros((), dtype=torch.float64)


def built(seed: int = 0) -> ConstrainedMotion:
    scales: Any = SCALES
    return right_hand_side(PendulumModelConfig(hidden=(6, 5), activation="tanh"), scales, seed)


def parameters() -> dict[str, torch.Tensor]:
    return {name.removeprefix("force."): value for name, value in built().named_parameters()}


def test_the_force_is_that_of_plain_torch() -> None:
    scales: Any = SCALES
    found = built().force(STATES)
    torch.testing.assert_close(found, learnt_force(parameters(), scales, STATES), rtol=1e-12, atol=1e-13)


def test_the_force_depends_on_position_and_velocity_alone() -> None:
    changed = STATES.clone()
    changed[..., 4] += 1
    assert torch.equal(built().force(changed), built().force(STATES))


def test_the_true_force_is_that_of_the_trajectories() -> None:
    found = TrueForce(PARAMETERS)(STATES).flatten(0, 1).numpy()
    expected = [applied_force(state[2:4].numpy()) for state in STATES.flatten(0, 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_where_the_algebraic_equation_holds_the_motion_is_that_without_the_tension() -> None:
    scales: Any = SCALES
    expected = eliminated(parameters(), scales, STATES)
    state = torch.cat([STATES[..., :4], expected[..., 4:]], dim=-1)
    found = built()(NOW, state)
    torch.testing.assert_close(found[..., :4], expected[..., :4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[..., 4], torch.zeros_like(found[..., 4]), rtol=0, atol=1e-11)


def test_the_algebraic_equation_is_the_second_derivative_of_the_constraint() -> None:
    state = STATES[0, 0]
    slopes = built()(NOW, state)

    def second_derivative(step: float) -> torch.Tensor:
        velocity, acceleration = slopes[0:2], slopes[2:4]
        squares = [(state[:2] + at * velocity + at**2 / 2 * acceleration).square().sum() / 2 for at in (-step, 0, step)]
        return (squares[0] - 2 * squares[1] + squares[2]) / step**2

    assert slopes[4].item() == pytest.approx(second_derivative(1e-3).item(), rel=1e-4)


def test_the_system_has_index_1() -> None:
    # The algebraic equation can be solved for the algebraic component wherever the rod has a length.
    assert torch.equal(mass_matrix(), torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)))
    for state in STATES.flatten(0, 1):
        jacobian = torch.autograd.functional.jacobian(lambda u: built()(NOW, u), state)
        assert jacobian[4, 4].item() == pytest.approx(-state[:2].square().sum().item(), rel=1e-12)


def test_seed_alone_fixes_the_parameters() -> None:
    first, again, other = (torch.cat([p.flatten() for p in built(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
