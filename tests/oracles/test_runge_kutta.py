"""The oracle's tables have the orders that their authors claim, and its integrator converges at them."""

import math
from fractions import Fraction

import pytest
import torch

from tests.oracles.runge_kutta import TABLEAUX, odeint_plain, order_defect, rooted_trees, steps_between

START = torch.tensor([1.0, 0.5], dtype=torch.float64)
# The two tables known only as 40 decimals satisfy the conditions to about that many. The fractions of Prince & Dormand
# approximate their numbers to 18 decimals.
ROUNDING = {"7vr": Fraction(1, 10**30), "8vr": Fraction(1, 10**30), "8dp": Fraction(1, 10**17)}
ROUNDING |= {"5ts": Fraction(1, 10**37), "853": Fraction(1, 10**26)}


def test_there_are_as_many_rooted_trees_as_cayley_counted() -> None:
    assert [len(rooted_trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("name", TABLEAUX)
def test_a_table_satisfies_every_order_condition_up_to_its_order(name: str) -> None:
    table = TABLEAUX[name]
    assert order_defect(table, table.order) <= ROUNDING.get(name, 0)


@pytest.mark.parametrize("name", TABLEAUX)
def test_a_table_fails_the_conditions_of_the_next_order(name: str) -> None:
    table = TABLEAUX[name]
    assert order_defect(table, table.order + 1) > Fraction(1, 10**6)


def predator_and_prey(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    prey, predator = u.unbind()
    return torch.stack([prey * (1.2 - predator) + 0.1 * torch.sin(3 * t), predator * (prey - 0.8)])


@pytest.fixture(scope="module")
def converged() -> torch.Tensor:
    end: torch.Tensor = odeint_plain(predator_and_prey, START, [0.0, 2.0], TABLEAUX["7vr"], step_size=0.01)[-1]
    return end


@pytest.mark.parametrize("name", TABLEAUX)
def test_the_integrator_converges_at_the_order_of_the_table(name: str, converged: torch.Tensor) -> None:
    table = TABLEAUX[name]

    def error(steps: int) -> float:
        end = odeint_plain(predator_and_prey, START, [0.0, 2.0], table, step_size=2.0 / steps)[-1]
        return float((end - converged).norm())

    steps = {1: 256, 2: 64, 3: 32, 4: 16, 5: 8, 6: 8, 7: 8, 8: 6}[table.order]
    assert math.log2(error(steps) / error(2 * steps)) > table.order - 0.1


def test_only_the_tables_whose_last_stage_is_the_next_first_are_fsal() -> None:
    assert {name for name, table in TABLEAUX.items() if table.first_same_as_last} == {"3bs", "5dp", "5bs", "5ts", "6vr"}


def test_time_runs_backward_from_the_end_to_the_start() -> None:
    table = TABLEAUX["8vr"]
    u0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    there = odeint_plain(lambda t, u: -u * t, u0, [0.0, 1.0], table, step_size=0.1)[-1]
    back = odeint_plain(lambda t, u: -u * t, there, [1.0, 0.0], table, step_size=0.1)[-1]
    torch.testing.assert_close(back, u0, rtol=1e-12, atol=0)


def test_an_interval_is_cut_into_the_fewest_equal_steps_that_are_short_enough() -> None:
    assert steps_between(0.0, 1.0, None) == [(0.0, 1.0)]
    assert steps_between(0.0, 1.0, 0.3) == [(0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]
    assert steps_between(1.0, 0.0, 0.6) == [(1.0, -0.5), (0.5, -0.5)]
    assert len(steps_between(0.0, 0.1 + 0.2, 0.1)) == 3
