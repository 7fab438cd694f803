"""The tableaux have the orders that are claimed, and the properties that their names state."""

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.dirk_tableaux import DIRK, OWN_DIRK
from tests.oracles.implicit_tableaux import ImplicitTableau, coloured_trees, numbers, order_defect
from tests.oracles.runge_kutta import TABLEAUX, rooted_trees
from tests.oracles.runge_kutta import order_defect as explicit_order_defect

TABLES = {**ARKIMEX, **DIRK, **OWN_DIRK}
# Coefficients that are given to 15 digits.
ROUNDING = 1e-12


def test_there_are_as_many_trees_of_one_and_of_two_colours_as_counted() -> None:
    assert [len(coloured_trees(n, 1)) for n in range(1, 9)] == [len(rooted_trees(n)) for n in range(1, 9)]
    # Entry A000151 of the On-Line Encyclopedia of Integer Sequences.
    assert [len(coloured_trees(n, 2)) for n in range(1, 7)] == [2, 4, 14, 52, 214, 916]


@pytest.mark.parametrize("name", ["2a", "4", "5dp"])
def test_the_conditions_of_one_colour_are_those_for_explicit_methods(name: str) -> None:
    explicit = TABLEAUX[name]
    square = [tuple(float(a) for a in row) for row in explicit.stages]
    table = ImplicitTableau(
        explicit.order, tuple((*row, 0.0) for row in square), tuple(float(b) for b in explicit.weights)
    )
    for order in (explicit.order, explicit.order + 1):
        assert order_defect(table, order) == pytest.approx(float(explicit_order_defect(explicit, order)), abs=1e-15)


def test_all_tables_of_petsc_are_there() -> None:
    assert list(ARKIMEX) == ["1bee", "ars122", "a2", "l2", "2c", "2d", "2e", "prssp2", "3", "bpr3", "ars443", "4", "5"]
    small = ["s212", "es122sal", "es213sal", "es324sal", "es325sal"]
    sixth, seventh = ["657a", "es648sa", "658a", "s659a"], ["7510sal", "es7510sa", "759a", "s7511sal"]
    assert list(DIRK) == [*small, *sixth, *seventh, "8614a", "8616sal", "es8516sal"]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_satisfies_every_order_condition_up_to_its_order_and_not_the_next(name: str) -> None:
    table = TABLES[name]
    assert order_defect(table, table.order) <= ROUNDING
    assert order_defect(table, table.order + 1) > 1e-5


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if table.embedded])
def test_an_embedded_method_has_its_order_and_no_more(name: str) -> None:
    table = TABLES[name]
    assert table.embedded_order is not None
    assert order_defect(table, table.embedded_order, embedded=True) <= ROUNDING
    assert order_defect(table, table.embedded_order + 1, embedded=True) > 1e-5


def test_bpr3_has_order_3_as_a_whole_with_three_quarters_in_its_implicit_part() -> None:
    table = ARKIMEX["bpr3"]
    assert order_defect(replace(table, explicit=(), explicit_weights=()), 3) <= ROUNDING
    assert order_defect(table, 2) == pytest.approx(0.075)
    assert order_defect(replace(table, explicit=(*table.explicit[:4], numbers("1/4 0 3/4 0"))), 3) <= ROUNDING


@pytest.mark.parametrize("name", DIRK)
def test_a_name_states_order_and_stages_and_what_kind_of_diagonal(name: str) -> None:
    table, digits = DIRK[name], name.lstrip("es").rstrip("sal")
    diagonal = {row[-1] for row in table.implicit}
    assert (table.order, len(table.implicit_weights)) == (int(digits[0]), int(digits[2:]))
    assert table.explicit_first_stage == name.startswith("e")
    if name.startswith(("s", "es")):
        assert len(diagonal - {0.0}) == 1
    else:
        assert len(diagonal - {0.0}) > 1
    assert all(row[-1] != 0 for row in table.implicit[1:])


def test_stiffly_accurate_are_the_methods_with_that_name_but_one() -> None:
    named = {name for name in DIRK if name.endswith(("sa", "sal"))}
    assert {name for name, table in DIRK.items() if table.stiffly_accurate} == (named | {"658a", "s659a"}) - {"8616sal"}
    assert {name for name, table in ARKIMEX.items() if not table.stiffly_accurate} == {"ars122", "l2"}


def stability(table: ImplicitTableau, z: complex) -> complex:
    """R(z) = 1 + z b (1 - z A)^-1 e, the factor of a step of du/dt = z u / h by the implicit part alone."""
    stages = len(table.implicit)
    matrix = np.zeros((stages, stages))
    for i, row in enumerate(table.implicit):
        matrix[i, : i + 1] = row
    slopes = np.linalg.solve(np.eye(stages) - z * matrix, np.ones(stages))
    return complex(1 + z * np.array(table.implicit_weights) @ slopes)


@pytest.mark.parametrize("name", [name for name in DIRK if name.endswith("l")])
def test_methods_named_l_stable_damp_infinitely_stiff_decay_at_once(name: str) -> None:
    # As closely as coefficients of 15 digits can tell.
    assert abs(stability(DIRK[name], -1e9)) <= 1e-3


@pytest.mark.parametrize("name", OWN_DIRK)
def test_our_own_methods_are_l_stable_too_and_stiffly_accurate(name: str) -> None:
    assert abs(stability(OWN_DIRK[name], -1e7)) <= 1e-5
    assert OWN_DIRK[name].stiffly_accurate


@pytest.mark.parametrize("name", TABLES)
def test_the_implicit_part_does_not_amplify_oscillations(name: str) -> None:
    frequencies = np.geomspace(1e-2, 1e4, 200)
    assert max(abs(stability(TABLES[name], 1j * y)) for y in frequencies) <= 1 + 1e-8
