"""The rule that accepts steps and chooses their sizes."""

from __future__ import annotations

import math

import pytest
import torch

from pnode_dist import ConfigurationError
from pnode_dist.ode.differentiable_solve import differentiable_solve
from pnode_dist.ode.kept_solvers import NoSolvers
from pnode_dist.ode.settings import CallSettings
from pnode_dist.ode.steppers.step_rule import StepRule
from pnode_dist.ode.steppers.tolerances import ErrorControl
from tests.oracles.right_hand_sides import Network, random

RULE = StepRule(safety=0.8, ifactor=5.0, dfactor=0.25)


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (0.0, 5.0),
        (1e-9, 5.0),
        (0.25, 0.8 * 2.0),
        (0.81, 1.0),
        (1.0, 0.8),
        (4.0, 0.8 / 2.0),
        (100.0, 0.25),
        (math.inf, math.nan),
        (math.nan, math.nan),
    ],
)
def test_the_next_size_follows_from_the_error_within_the_factors(ratio: float, factor: float) -> None:
    assert RULE.next_size(0.3, (ratio, 1.0, 1.0), order=2) == pytest.approx(0.3 * factor, nan_ok=True)


def test_sizes_stay_between_their_bounds() -> None:
    rule = StepRule(min_step=0.1, max_step=0.5)
    assert rule.next_size(0.3, (0.0, 1.0, 1.0), order=2) == 0.5
    assert rule.next_size(0.3, (1e6, 1.0, 1.0), order=2) == 0.1
    assert [rule.limited(size) for size in (0.01, 0.3, 7.0)] == [0.1, 0.3, 0.5]


def test_a_step_of_the_least_size_is_accepted_unless_its_error_is_not_finite() -> None:
    rule = StepRule(min_step=0.1)
    assert rule.accepts(0.2, 1.0)
    assert not rule.accepts(0.2, 1.001)
    assert rule.accepts(0.1, 1.001)
    assert not rule.accepts(0.1, math.nan)
    assert not StepRule().accepts(1e-300, math.inf)


def test_a_method_without_an_error_estimate_is_refused() -> None:
    settings = CallSettings(method="rk4", rtol=1e-3, atol=1e-3, rule=StepRule())
    with pytest.raises(ConfigurationError, match="'rk4': has no error estimate for a step rule: must be one of heun, "):
        differentiable_solve(NoSolvers(), NoSolvers(), Network(), random(2, 3), [0.0, 1.0], settings, ())


def test_a_tolerance_may_be_zero_with_a_rule_alone() -> None:
    for zero in (0.0, torch.zeros(3)):
        assert ErrorControl(1e-3, zero, rule=StepRule()).atol is zero
        with pytest.raises(ConfigurationError, match="positive"):
            ErrorControl(1e-3, zero)
    with pytest.raises(ConfigurationError, match=r"atol = -1\.0: must be positive or zero"):
        ErrorControl(1e-3, -1.0, rule=StepRule())
