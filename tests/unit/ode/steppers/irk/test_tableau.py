"""The coefficients are those of collocation, and the triangle preconditions the stages with one shift."""

import pytest
import torch

from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.steppers.irk.tableau import IRK_TABLES
from tests.oracles.collocation import COLLOCATION

NAMES = [name for name, method in METHODS.items() if method.family == "irk"]


def test_every_method_of_the_family_has_a_table_and_an_oracle() -> None:
    assert set(NAMES) == set(IRK_TABLES) == set(COLLOCATION)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_order_and_stages_are_those_of_collocation(name: str) -> None:
    table, oracle, method = IRK_TABLES[name], COLLOCATION[name], METHODS[name]
    for found, wanted in ((table.matrix, oracle.matrix), (table.weights, oracle.weights), (table.nodes, oracle.nodes)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-15)
    assert (method.order, method.stages) == (oracle.order, len(oracle.nodes))
    assert method.stiffly_accurate == table.ends_in_last_stage == name.startswith("radau")


@pytest.mark.parametrize("name", NAMES)
def test_the_result_by_the_stages_is_that_by_their_slopes(name: str) -> None:
    table, state = IRK_TABLES[name], torch.tensor([0.5, -2.0], dtype=torch.float64)
    slopes = torch.rand(table.stages, 2, dtype=torch.float64)
    matrix = torch.tensor(table.matrix, dtype=torch.float64)
    found = table.result(state, state + matrix @ slopes)
    torch.testing.assert_close(found, state + torch.tensor(table.weights, dtype=torch.float64) @ slopes)
    torch.testing.assert_close(table.inverse @ matrix, torch.eye(table.stages, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_the_triangle_has_equal_shifts_and_clusters_the_stages_at_one(name: str) -> None:
    table = IRK_TABLES[name]
    triangle, identity = table.triangle, torch.eye(table.stages, dtype=torch.float64)
    assert torch.equal(triangle.tril(), triangle)
    assert torch.equal(triangle.diagonal(), torch.full((table.stages,), table.shift, dtype=torch.float64))
    # The preconditioned stages of du/dt = -x u for steps from far too short to far too long.
    for x in (0.0, 1.0, 10.0, 1e6):
        found = torch.linalg.eigvals(torch.linalg.solve(triangle + x * identity, table.inverse + x * identity))
        assert float((found - 1).abs().max()) < 0.6
