"""The largest stable step: that of linear theory where there is one."""

import pytest
import torch
from mpi4py import MPI

from pnode_dist.problems.semilinear.periodic_line import line
from pnode_dist.problems.semilinear.stable_step import TOLERANCE, largest_stable_step

# Where the stability regions of the methods of these orders with as many stages leave the negative real axis.
LIMITS = {"euler": 2.0, "heun": 2.0, "rk3": 2.5127, "bosh3": 2.5127, "rk4": 2.7853}
RATE = 40.0


class Decay(torch.nn.Module):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -RATE * u


@pytest.mark.parametrize("method", LIMITS)
@pytest.mark.parametrize("guess", [1e-3, 10.0])
def test_the_step_of_a_decay_is_that_of_the_stability_region(method: str, guess: float) -> None:
    state = torch.ones(1, 6, 1, dtype=torch.float64)
    found = largest_stable_step(Decay(), state, method, line(MPI.COMM_SELF, 6), guess)
    assert LIMITS[method] * (1 - 2 * TOLERANCE) < RATE * found < LIMITS[method]


def test_what_can_grow_does_though_it_is_not_in_the_state() -> None:
    class Diffusion(torch.nn.Module):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return u.roll(1, -2) - 2 * u + u.roll(-1, -2)

    # A constant is at rest; the shortest wave decays at the rate 4.
    found = largest_stable_step(
        Diffusion(), torch.ones(1, 8, 1, dtype=torch.float64), "euler", line(MPI.COMM_SELF, 8), 1.0
    )
    assert 0.48 < found < 0.5


class Still(torch.nn.Module):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 0 * u


class Growth(torch.nn.Module):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u.square() * 1e30


@pytest.mark.parametrize(("func", "message"), [(Still(), "euler is stable with steps of"), (Growth(), "is not stable")])
def test_a_search_without_end_is_an_error(func: torch.nn.Module, message: str) -> None:
    with pytest.raises(ArithmeticError, match=message):
        largest_stable_step(func, torch.ones(1, 6, 1, dtype=torch.float64), "euler", line(MPI.COMM_SELF, 6), 1.0)
