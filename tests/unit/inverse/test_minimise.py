"""Minimisation on one rank: closed forms, PETSc's van der Pol example, all methods, and refused options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist import ConfigurationError, Mesh, NeuralODE
from pnode_dist.inverse import METHODS, Control, Dense, Gaussian, Inverse, Observation, minimise
from pnode_dist.inverse.tao_methods import _REASONS, reason_in_words
from tests.oracles import petsc_tao
from tests.oracles.right_hand_sides import random
from tests.unit.inverse.heat_line import heat_line

TIGHT = {"tao_gatol": 1e-11, "tao_grtol": 0.0}


class VanDerPol(nn.Module):
    """The equations of PETSc's example."""

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = mu

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        x, y = u
        return torch.stack([y, self.mu * ((1 - x * x) * y - x)])


@pytest.mark.nightly
def test_newton_steps_on_the_van_der_pol_equations_are_as_few_as_in_petsc() -> None:
    node = NeuralODE(VanDerPol(100.0), method="cn", step_size=0.01)
    with torch.no_grad():
        data = node(petsc_tao.van_der_pol_start(100.0), [0.0, 0.5])[-1]
    guess = torch.tensor(petsc_tao.VAN_DER_POL_GUESS, dtype=torch.float64)
    problem = Inverse(node, [Control(guess)], [Observation(0.5, None, data, 0.5)])
    found = minimise(problem, method="bntr", options={"tao_bnk_pc_type": "none"})
    first = found.history[0]
    assert tuple(map(petsc_tao.to_six_digits, (first.value, first.gradient_norm))) == petsc_tao.VAN_DER_POL_FIRST
    assert found.converged
    assert found.iterations <= petsc_tao.VAN_DER_POL_STEPS
    assert found.value <= petsc_tao.VAN_DER_POL_LAST


class Linear(nn.Module):
    """du/dt = A u."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random(3, 3, seed=2) / 2)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.matrix @ u


def linear_problem(bounds: Any = (None, None)) -> tuple[Inverse, torch.Tensor]:
    """A linear problem with Gaussian errors, and the mean of its posterior in closed form."""
    node = NeuralODE(Linear(), step_size=0.1)
    factor, mean, data = random(3, 3, seed=3), random(3, seed=4), random(2, 3, seed=5)
    prior = factor @ factor.T + torch.eye(3, dtype=torch.float64)
    errors = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    problem = Inverse(
        node,
        [Control(torch.zeros(3, dtype=torch.float64), Gaussian(mean, Dense(prior)), bounds)],
        [Observation([0.5, 1.0], None, data, errors)],
    )
    unit = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        columns = [node(column, [0.0, 0.5, 1.0])[1:] for column in unit]
    model = torch.stack(columns, dim=-1).reshape(6, 3)
    weights = (1 / errors).repeat(2)
    precision = torch.linalg.inv(prior) + model.T @ (weights[:, None] * model)
    pulled = torch.linalg.solve(prior, mean) + model.T @ (weights * data.reshape(-1))
    return problem, torch.linalg.solve(precision, pulled)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_posterior_mean_of_a_linear_problem(method: str) -> None:
    problem, wanted = linear_problem()
    found = minimise(problem, method=method, options=TIGHT)
    assert found.converged, found.reason
    assert torch.allclose(found.values[0], wanted, rtol=1e-7, atol=1e-9)
    assert found.products > 0 or METHODS[method].needs == "gradient"
    assert METHODS[method].name in {getattr(PETSc.TAO.Type, name) for name in dir(PETSc.TAO.Type) if name[0] != "_"}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.bounds])
def test_methods_with_bounds_keep_to_them(method: str) -> None:
    _, free = linear_problem()
    bound = free.min().item() + 0.05
    problem, _ = linear_problem((bound, None))
    found = minimise(problem, method=method, options={"tao_gatol": 1e-8, "tao_grtol": 0.0})
    assert found.converged, found.reason
    (state,) = found.values
    at_bound = state <= bound + 1e-8
    assert state.min() >= bound - 1e-10
    assert 0 < at_bound.sum() < 3
    problem(found.m)
    (slope,) = problem.space.unpack(problem.derivative())
    assert (slope[at_bound] > 0).all()
    assert slope[~at_bound].abs().max() < 1e-5


def test_a_gauss_newton_hessian_of_a_linear_problem_is_the_exact_one() -> None:
    problem, wanted = linear_problem()
    results = [minimise(problem, method="bntr", options=TIGHT, hessian=kind) for kind in ("exact", "gauss_newton")]
    for found in results:
        assert torch.allclose(found.values[0], wanted, rtol=1e-8)
    problem(problem.space.guess())
    v = problem.space.random(1)
    assert (problem.hessian(v) - problem.gauss_newton(v)).norm() <= 1e-12 * v.norm()


def test_parameters_hold_the_result_of_a_minimisation() -> None:
    torch.manual_seed(0)
    model = Linear()
    node = NeuralODE(model, step_size=0.1)
    u0, times = random(3, seed=1), [0.0, 0.5, 1.0]
    with torch.no_grad():
        data = node(u0, times)[1:]
        model.matrix += 0.1 * random(3, 3, seed=8)
    problem = Inverse(node, [Control(model)], [Observation(times[1:], None, data, 1e-2)], u0=u0)
    found = minimise(problem, options={"tao_gatol": 1e-8, "tao_max_it": 500})
    assert found.converged
    assert torch.equal(model.matrix.detach(), found.values[0])
    with torch.no_grad():
        assert torch.allclose(node(u0, times)[1:], data, atol=1e-6)


@pytest.mark.slow
def test_iterations_do_not_depend_on_the_mesh_with_an_inner_product_of_functions() -> None:
    options = {"tao_gatol": 0, "tao_grtol": 0, "tao_gttol": 1e-3}

    mesh = Mesh()
    coarse, fine = (minimise(heat_line(mesh, points, of_functions=True), options=options) for points in (24, 48))
    assert coarse.converged
    assert fine.converged
    assert abs(fine.iterations - coarse.iterations) <= 2
    options["tao_max_it"] = 3 * fine.iterations
    assert not minimise(heat_line(mesh, 48), options=options).converged
    mesh.close()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "newton"}, r"method = 'newton': must be one of blmvm, lmvm, "),
    ({"hessian": "approximate"}, r"hessian = 'approximate': must be one of exact, gauss_newton"),
    ({"options": {"tao_type": "bncg"}}, r"options: 'tao_type': use method="),
    ({"options": {"snes_rtol": 1e-9}}, r"options: 'snes_rtol': must begin with tao_"),
    (
        {"options": {"tao_gatoll": 1e-9}},
        r"options: 'tao_gatoll': nothing reads it with this method: did you mean tao_gatol",
    ),
    ({"options": {"tao_bnk_pc_type": "none"}}, r"options: 'tao_bnk_pc_type': nothing reads it with this method"),
    ({"resume": True}, r"resume = True: needs record="),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_tao_does_not_read_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        minimise(linear_problem()[0], **arguments)


def test_bounds_need_a_method_and_an_inner_product_that_allow_them() -> None:
    with pytest.raises(ConfigurationError, match="method = 'lmvm': takes no bounds: must be one of blmvm, bqnls"):
        minimise(linear_problem((0.0, None))[0], method="lmvm")
    problem, _ = linear_problem()
    (control,) = problem.space.controls
    bounded = Control(control.tensors[0], control.given.prior, (0.0, None), "prior")
    with pytest.raises(ConfigurationError, match="bounds: need a diagonal inner_product"):
        minimise(Inverse(problem.node, [bounded], problem.model.observations))


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    def resumed() -> None:
        minimise(linear_problem()[0], record=tmp_path, resume=True)

    minimise(linear_problem()[0], record=tmp_path, options={})
    files = sorted(tmp_path.glob("evaluation-*.pt"))
    assert len(files) > 3
    torch.save({**torch.load(files[1]), "norm": 17.0}, files[1])
    with pytest.raises(ConfigurationError, match=r"evaluation-000001\.pt: is of another point"):
        resumed()
    files[1].write_bytes(files[1].read_bytes()[:100])
    with pytest.raises(ConfigurationError, match="record = "):
        resumed()
    (tmp_path / "inversion.json").write_text("{")
    with pytest.raises(ConfigurationError, match="record = "):
        resumed()


def test_an_error_of_the_callback_is_raised_as_it_is() -> None:
    def fail(progress: Any) -> None:
        raise KeyError("of the callback")

    with pytest.raises(KeyError, match="of the callback"):
        minimise(linear_problem()[0], callback=fail)


def test_all_reasons_of_tao_have_words() -> None:
    names = [name for name in dir(PETSc.TAO.ConvergedReason) if name.startswith(("CONVERGED", "DIVERGED"))]
    numbers = {getattr(PETSc.TAO.ConvergedReason, name) for name in names} - {0}
    assert len({reason_in_words(number) for number in numbers}) == len(_REASONS)
