"""PETSc's options reach the solver, and those that would break the adjoint are refused."""

import pytest
import torch
from petsc4py import PETSc

from pnode_dist import NeuralODE, odeint
from pnode_dist.errors import ConfigurationError
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 1.0]
U0 = random(2, 3)


@pytest.mark.parametrize("table", ["8vr", "1fe", "5dp"])
def test_ts_rk_type_chooses_the_table(table: str) -> None:
    network = Network()
    parameters = list(network.parameters())
    found = gradients(
        lambda u: odeint(network, u, TIMES, method="rk4", step_size=0.2, options={"ts_rk_type": table}), U0, parameters
    )
    wanted = gradients(lambda u: odeint_plain(network, u, TIMES, TABLEAUX[table], 0.2), U0, parameters)
    other = odeint_plain(network, U0, TIMES, TABLEAUX["4"], 0.2)
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))
    assert distance(found[0], other) > 1e-8


def test_an_option_in_petsc_s_database_chooses_the_table() -> None:
    network, database = Network(), PETSc.Options()
    database.setValue("ts_rk_type", "8vr")
    try:
        found = odeint(network, U0, TIMES, step_size=0.2)
    finally:
        database.delValue("ts_rk_type")
    assert distance(found, odeint_plain(network, U0, TIMES, TABLEAUX["8vr"], 0.2)) <= 1e-13


def test_options_stay_with_their_own_solver() -> None:
    network = Network()
    odeint(network, U0, TIMES, options={"ts_rk_type": "8vr"})
    assert not PETSc.Options().hasName("ts_rk_type")
    assert not PETSc.Options().hasName("ts_adapt_type")
    assert distance(odeint(network, U0, TIMES), odeint_plain(network, U0, TIMES, TABLEAUX["4"])) <= 1e-13


def test_changed_options_of_a_module_take_effect() -> None:
    node = NeuralODE(Network(), step_size=0.2)
    before = node(U0, TIMES)
    node.options = {"ts_rk_type": "1fe"}
    assert distance(node(U0, TIMES), odeint_plain(node.func, U0, TIMES, TABLEAUX["1fe"], 0.2)) <= 1e-13
    node.options = None
    assert torch.equal(node(U0, TIMES), before)


def test_ts_monitor_prints_every_step_with_its_time(capfd: pytest.CaptureFixture[str]) -> None:
    odeint(Network(), U0, [0.0, 0.5, 1.0], step_size=0.25, options={"ts_monitor": None})
    lines = [line.split() for line in capfd.readouterr().out.splitlines() if " TS " in line]
    assert [(line[0], float(line[line.index("time") + 1])) for line in lines] == [
        ("0", 0.0),
        ("1", 0.25),
        ("2", 0.5),
        ("3", 0.75),
        ("4", 1.0),
    ]
    odeint(Network(), U0, [0.0, 0.5, 1.0])
    assert " TS " not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["beuler", "cn", "arkimex", "euler", "ssp"])
def test_another_type_of_solver_is_refused(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="ts_type") as caught:
        odeint(Network(), U0, TIMES, options={"ts_type": kind})
    message = str(caught.value)
    assert repr(kind) in message
    assert "'rk'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options", [{"ts_type": "nonsense"}, {"ts_rk_type": "nonsense"}], ids=["ts_type", "ts_rk_type"]
)
def test_a_value_that_petsc_does_not_know_is_refused_in_one_line(options: dict[str, str]) -> None:
    # PETSc itself drops the last letter of an unknown table.
    with pytest.raises(ConfigurationError, match="nonsens") as caught:
        odeint(Network(), U0, TIMES, options=options)
    assert "\n" not in str(caught.value)


def test_the_solver_works_after_an_option_was_refused() -> None:
    node = NeuralODE(Network(), options={"ts_type": "beuler"})
    with pytest.raises(ConfigurationError):
        node(U0, TIMES)
    node.options = None
    assert distance(node(U0, TIMES), odeint_plain(node.func, U0, TIMES, TABLEAUX["4"])) <= 1e-13
    assert not PETSc.Options().hasName("ts_type")


@pytest.mark.parametrize("adapt", ["basic", "dsp", "none"])
def test_steps_stay_of_the_size_asked_for(adapt: str) -> None:
    network = Network()
    options = {"ts_adapt_type": adapt, "ts_adapt_dt_max": "0.01", "ts_rtol": "1e-12"}
    try:
        found = odeint(network, U0, TIMES, method="dopri5", step_size=0.2, options=options)
    except ConfigurationError as error:
        assert "ts_adapt_type" in str(error)  # noqa: PT017
    else:
        assert distance(found, odeint_plain(network, U0, TIMES, TABLEAUX["5dp"], 0.2)) <= 1e-13


@pytest.mark.parametrize(
    "options", [{"ts_max_steps": "2"}, {"ts_max_time": "0.1"}, {"ts_time_step": "0.01"}, {"ts_init_time": "5"}]
)
def test_options_about_the_end_of_a_solve_do_not_cut_it_short(options: dict[str, str]) -> None:
    network = Network()
    parameters = list(network.parameters())
    try:
        found = gradients(lambda u: odeint(network, u, TIMES, step_size=0.1, options=options), U0, parameters)
    except ConfigurationError as error:
        assert next(iter(options)) in str(error)  # noqa: PT017
    else:
        wanted = gradients(lambda u: odeint_plain(network, u, TIMES, TABLEAUX["4"], 0.1), U0, parameters)
        assert distance(found, wanted) <= 1e-12
