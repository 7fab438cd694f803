"""The difference quotient has the order it claims."""

import math

import torch

from tests.oracles.differences import directional_derivative


def test_the_error_falls_with_the_fourth_power_of_the_step() -> None:
    point = (torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64))
    direction = (torch.ones(1, dtype=torch.float64), torch.full((1,), -2.0, dtype=torch.float64))

    def error(step: float) -> float:
        found = directional_derivative(lambda x, y: (torch.exp(x) * torch.sin(y)).sum(), point, direction, step)
        exact = math.exp(0.3) * (math.sin(0.7) - 2 * math.cos(0.7))
        return abs(found - exact)

    assert 3.9 < math.log2(error(0.2) / error(0.1)) < 4.1
    assert error(1e-3) < 1e-11
