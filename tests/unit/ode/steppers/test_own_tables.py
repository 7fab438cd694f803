"""The explicit methods that PETSc lacks: their error estimates are those of the publications."""

from __future__ import annotations

from fractions import Fraction

import pytest
from petsc4py import PETSc

from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.steppers.own_tables import OWN_TABLES, register_own_tables
from pnode_dist.petsc import calls
from tests.oracles.runge_kutta import TABLEAUX, Tableau, order_defect

EMBEDDED_ORDERS = {"2f": 1, "2r": 1, "5ts": 4, "8dp": 7, "853": 5}


def test_every_own_table_is_a_method_and_its_estimate_is_known() -> None:
    names = {method.petsc_name: method.estimates_error for method in METHODS.values() if method.family == "rk"}
    assert {name for name in OWN_TABLES if names[name]} == set(EMBEDDED_ORDERS)
    register_own_tables()
    for name in OWN_TABLES:
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        ts.setType(PETSc.TS.Type.RK)
        ts.setRKType(name)
        *_, embedded = calls.runge_kutta_tableau(ts)
        ts.destroy()
        assert (embedded is not None) == names[name]


@pytest.mark.parametrize(("name", "order"), EMBEDDED_ORDERS.items())
def test_the_embedded_method_has_its_order_and_no_more(name: str, order: int) -> None:
    table = OWN_TABLES[name]
    assert table.embedded is not None
    weights = tuple(map(Fraction, table.embedded.split()))
    embedded = Tableau(order, TABLEAUX[name].stages, weights)
    assert order_defect(embedded, order) <= Fraction(1, 10**17)
    assert order_defect(embedded, order + 1) > Fraction(1, 10**6)


def test_the_second_estimate_of_dop853_is_that_of_order_3() -> None:
    weights = OWN_TABLES["853"].second_embedded
    assert weights is not None
    embedded = Tableau(3, TABLEAUX["853"].stages, tuple(map(Fraction, weights.split())))
    assert order_defect(embedded, 3) <= Fraction(1, 10**26)
    assert order_defect(embedded, 4) > Fraction(1, 10**6)
