"""What the table of methods says of the implicit ones is what their tableaux say."""

import pytest

from pnode_dist.ode.methods import METHODS, OTHER_NAMES, resolve
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.dirk_tableaux import DIRK, OWN_DIRK

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
