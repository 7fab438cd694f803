"""What the table of methods says of the implicit ones is what their tableaux say."""

import pytest
import torch

from pnode_dist import NeuralODE
from pnode_dist.ode.methods import METHODS, OTHER_NAMES, resolve
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.dirk_tableaux import DIRK, OWN_DIRK
from tests.oracles.right_hand_sides import Network, random

TABLEAUX = {
    **{f"arkimex_{name}": table for name, table in ARKIMEX.items()},
    **{f"dirk_{name}": table for name, table in DIRK.items()},
    **OWN_DIRK,
}


def test_every_tableau_of_petsc_and_of_ours_is_there_once() -> None:
    assert {name for name, method in METHODS.items() if method.family in ("arkimex", "dirk")} == set(TABLEAUX)
    assert all(METHODS[name].petsc_name == name.split("_")[-1] for name in TABLEAUX)


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_stages_and_stiff_accuracy_are_those_of_the_tableau(name: str) -> None:
    method, table = METHODS[name], TABLEAUX[name]
    assert (method.order, method.stages) == (table.order, len(table.implicit_weights))
    assert method.stiffly_accurate == table.stiffly_accurate
    assert method.estimates_error == (table.embedded is not None)


def test_kvaerno3_and_trbdf2_are_petsc_s_tables_under_their_usual_names() -> None:
    assert [resolve(name).name for name in ("kvaerno3", "trbdf2")] == ["dirk_es324sal", "dirk_es213sal"]
    assert not OTHER_NAMES.keys() & METHODS.keys()


@pytest.mark.parametrize("name", [name for name, table in TABLEAUX.items() if table.explicit_first_stage])
def test_a_solve_does_not_depend_on_the_one_before(name: str) -> None:
    # The slope of an explicit first stage is solved for anew, not taken from the end of another solve.
    node = NeuralODE(Network(), method=name, step_size=0.1, newton="petsc")
    with torch.no_grad():
        first = node(random(2, 3), [0.0, 0.2])
        node(random(2, 3, seed=4), [0.0, 0.2])
        assert torch.equal(node(random(2, 3), [0.0, 0.2]), first)
