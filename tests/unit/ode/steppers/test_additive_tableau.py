"""The tables read from PETSc are those of the publications, and theta methods are tables too."""

import numpy as np
import pytest
from petsc4py import PETSc

from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.steppers.additive_tableau import petsc_tableau, theta_tableau
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.dirk_tableaux import DIRK, OWN_DIRK
from tests.oracles.implicit_tableaux import ImplicitTableau, Row

TABLEAUX: dict[str, ImplicitTableau] = {
    **{f"arkimex_{name}": table for name, table in ARKIMEX.items()},
    **{f"dirk_{name}": table for name, table in DIRK.items()},
    **OWN_DIRK,
}


def near(found: tuple[Row, ...], rows: tuple[Row, ...]) -> bool:
    square = np.zeros((len(found), len(found)))
    for number, row in enumerate(rows):
        square[number, : len(row)] = row
    # PETSc's entries of these tables are up to 3.
    return bool(np.allclose(found, square, rtol=1e-14, atol=1e-14))


@pytest.mark.parametrize("name", TABLEAUX)
def test_the_table_read_from_petsc_is_that_of_the_publication(name: str) -> None:
    found, wanted = petsc_tableau(METHODS[name]), TABLEAUX[name]
    assert near(found.implicit, wanted.implicit)
    assert np.allclose(found.weights, wanted.implicit_weights, rtol=1e-14, atol=1e-14)
    assert np.allclose(found.nodes, wanted.implicit_nodes, rtol=1e-14, atol=1e-14)
    assert bool(found.explicit) == wanted.additive
    if wanted.additive:
        assert near(found.explicit, wanted.explicit)
        assert np.allclose(found.explicit_weights, wanted.explicit_weights, rtol=1e-14, atol=1e-14)
        assert np.allclose(found.explicit_nodes, wanted.explicit_nodes, rtol=1e-14, atol=1e-14)
    assert found.without_explicit_part.ends_in_last_stage == wanted.stiffly_accurate


def test_zeros_of_a_table_are_exact() -> None:
    found = petsc_tableau(METHODS["arkimex_3"])
    assert found.implicit[0] == (0.0,) * 4
    assert all(row[stage] == 0.0 for stage, row in enumerate(found.explicit))
    assert found.nodes == found.explicit_nodes


def test_options_of_the_command_line_do_not_change_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    options = PETSc.Options()
    options.setValue("ts_type", "euler")
    options.setValue("snes_max_it", 0)
    try:
        found = petsc_tableau.__wrapped__(METHODS["dirk_es213sal"])
    finally:
        options.delValue("ts_type")
        options.delValue("snes_max_it")
    assert near(found.implicit, TABLEAUX["dirk_es213sal"].implicit)


def test_theta_methods_are_tables_of_one_stage_or_two() -> None:
    assert theta_tableau(1.0, True).implicit == ((1.0,),)
    assert theta_tableau(1.0, False).ends_in_last_stage
    assert not theta_tableau(0.5, False).ends_in_last_stage
    crank_nicolson = theta_tableau(0.5, True)
    assert crank_nicolson.implicit == ((0.0, 0.0), (0.5, 0.5))
    assert crank_nicolson.ends_in_last_stage
    assert crank_nicolson.uses_slope == (True, False)
