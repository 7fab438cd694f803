"""The table of methods: what it holds, what it is called, and what is said to a wrong name."""

import math

import petsc4py
import pytest
import torch
from petsc4py import PETSc

from pnode_dist import odeint
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import ADJOINT_FLOORS, METHODS, adjoint_here, gradient_refusal, resolve
from tests.oracles.runge_kutta import TABLEAUX

USUAL_NAMES = {
    "euler": "1fe",
    "heun": "2a",
    "midpoint": "2b",
    "fehlberg2": "2f",
    "heun3": "3h",
    "bosh3": "3bs",
    "rk4": "4",
    "rk4_38": "4k",
    "fehlberg5": "5f",
    "dopri5": "5dp",
    "dopri8": "8dp",
    "ralston": "2r",
    "ralston3": "3r",
    "ssp33": "3s",
    "ssp104": "4s",
    "tsit5": "5ts",
    "dop853": "853",
}


def test_every_explicit_table_of_petsc_is_there_once() -> None:
    assert sorted(method.petsc_name for method in METHODS.values() if method.family == "rk") == sorted(TABLEAUX)
    of_petsc = {value for key, value in vars(PETSc.TS.RKType).items() if key.startswith("RK")}
    assert of_petsc <= set(TABLEAUX)


@pytest.mark.parametrize(("usual", "petsc"), USUAL_NAMES.items())
def test_the_usual_name_and_petsc_s_mean_the_same_method(usual: str, petsc: str) -> None:
    assert resolve(usual) is resolve(petsc)
    assert resolve(usual).petsc_name == petsc
    assert resolve(usual).name == usual


@pytest.mark.parametrize("petsc_name", TABLEAUX)
def test_order_stages_and_fsal_are_those_of_the_published_table(petsc_name: str) -> None:
    method, table = resolve(petsc_name), TABLEAUX[petsc_name]
    assert (method.order, method.stages) == (table.order, len(table.weights))
    assert method.fsal == table.first_same_as_last


@pytest.mark.parametrize("wrong", ["rk5", "RK4", "dopri", "", "backward_euler", "tsit", "arkimex"])
def test_an_unknown_name_is_answered_with_all_that_are_known(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="method") as caught:
        resolve(wrong)
    message = str(caught.value)
    assert repr(wrong) in message
    assert "\n" not in message
    for name in (*METHODS, *TABLEAUX):
        family, _, table = name.partition("_")
        assert name in message or (f"{family}_<" in message and table in message)


def test_gauss_of_one_stage_is_the_implicit_midpoint_rule() -> None:
    assert resolve("gauss2") is resolve("theta")
    u0 = torch.ones(1, dtype=torch.float64)
    (_, end) = odeint(lambda t, u: -u, u0, [0.0, 0.5], method="gauss2", step_size=0.5)
    torch.testing.assert_close(end, u0 * 0.75 / 1.25, rtol=1e-8, atol=0)


def test_a_near_miss_is_recognised() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'dopri5'"):
        resolve("dopri")


@pytest.mark.parametrize("version", ["3.22.4", "3.25.5"])
def test_petsc_s_dirk_solves_forward_and_refuses_gradients_below_petsc_3_26(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(petsc4py, "__version__", version)
    u0 = torch.ones(2, dtype=torch.float64)

    def solve(newton: str) -> torch.Tensor:
        return odeint(lambda t, u: -u, u0, [0.0, 0.5], method="dirk_es324sal", step_size=0.05, newton=newton)[-1]

    torch.testing.assert_close(solve("petsc"), torch.exp(-0.5 * u0), rtol=1e-5, atol=0)
    u0.requires_grad_()
    (gradient,) = torch.autograd.grad(solve("batch").sum(), u0)
    torch.testing.assert_close(gradient, torch.full_like(u0, math.exp(-0.5)), rtol=1e-5, atol=0)
    with pytest.raises(ConfigurationError) as caught:
        solve("petsc")
    assert str(caught.value) == (
        f"method = 'dirk_es324sal': its gradient needs PETSc 3.26 or newer and found {version}: solve small "
        "systems with newton = 'batch', others under torch.no_grad(), or choose a method of the families rk, "
        "theta, arkimex or irk"
    )


@pytest.mark.parametrize("version", ["3.26.0", "3.27.1", "4.0.0"])
def test_no_adjoint_is_refused_from_petsc_3_26_on(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(petsc4py, "__version__", version)
    for method in METHODS.values():
        assert adjoint_here(method) == method.adjoint
        assert (gradient_refusal(method) is None) == (method.adjoint == "verified")


def test_below_petsc_3_26_only_the_adjoints_of_dirk_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(petsc4py, "__version__", "3.22.0")
    refused = {method.family for method in METHODS.values() if adjoint_here(method) == "refused: needs PETSc 3.26"}
    assert refused == set(ADJOINT_FLOORS) == {"dirk"}
