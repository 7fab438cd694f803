"""An option that nothing heeds is an error that names what to use instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from petsc4py import PETSc

from pnode_dist import NeuralODE, consistent, odeint
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.split import MatrixFunction
from pnode_dist.ode.steppers.base import options_database
from tests.oracles.right_hand_sides import Network, distance, random

U0 = random(2, 3)
TIMES = [0.0, 0.4, 1.0]


def refused(options: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        NeuralODE(Network(), options=options, **{"step_size": 0.2, **settings})(U0, TIMES)
    message = str(caught.value)
    assert "\n" not in message
    assert all(repr(name) in message for name in options)
    assert not any(PETSc.Options().hasName(name) for name in options)
    return message


def test_the_step_size_of_torchdiffeq_is_an_argument_here() -> None:
    u = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match=r"'step_size': is an argument of its own: step_size=0\.0001"):
        odeint(lambda t, x: x, u, [0.0, 5.9], method="euler", options={"step_size": 1e-4})
    end = odeint(lambda t, x: x, u, [0.0, 5.9], method="euler", step_size=1e-4)[-1].item()
    assert abs(end - (1 + 1e-4) ** 59000) <= 1e-8 * end
    assert abs(end - 365.04) <= 0.2


def test_options_that_nothing_reads_are_all_named() -> None:
    message = refused({"jump_t": 0, "nonsense": 1})
    assert "'jump_t': put such times into t" in message
    assert "'nonsense': nothing reads it" in message


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("grid_points", "into t"),
        ("grid_constructor", "into t"),
        ("step_t", "into t"),
        ("perturb", "from jump to jump"),
        ("interp", "nothing is interpolated"),
        ("jump_t", "pnode_dist.torchdiffeq.odeint takes it"),
        ("norm", "rtol= and atol="),
        ("dtype", "compute_dtype="),
        ("max_num_steps", "max_steps=1"),
        ("first_step", "first_step=1"),
        ("min_step", "dt_min=1"),
        ("max_step", "dt_max=1"),
        ("safety", "{'ts_adapt_safety': 1}"),
        ("ifactor", "{'ts_adapt_clip': '0.1,1'}"),
        ("dfactor", "{'ts_adapt_clip': '1,10'}"),
        ("max_iters", "snes_max_it"),
        ("rtol", "rtol=1"),
        ("method", "method=1"),
    ],
)
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_options_of_torchdiffeq_are_answered_with_what_to_use(option: str, instead: str, method: str) -> None:
    assert instead in refused({option: 1}, method=method)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("ts_dt", "step_size=1"),
        ("ts_time_step", "step_size=1"),
        ("ts_max_steps", "t[-1]"),
        ("ts_max_time", "t[-1]"),
        ("ts_final_time", "t[-1]"),
        ("ts_init_time", "t[0]"),
        ("ts_rtol", "rtol=1"),
        ("ts_exact_final_time", "every time of t"),
        ("ts_save_trajectory", "Trajectory("),
        ("ts_trajectory_type", "Trajectory("),
        ("ts_adjoint_monitor", "outside of TSAdjointSolve"),
        ("ts_adapt_safety", "rtol= or atol= only"),
        ("ts_equation_type", "follows from the method"),
        ("ts_rk_multirate", "nothing reads it"),
        ("ts_view", "nothing reads it"),
        ("ts_monitr", "did you mean ts_monitor?"),
    ],
)
@pytest.mark.parametrize("method", ["rk4", "beuler", "arkimex_3", "ssp_rks2"])
def test_options_that_petsc_reads_in_vain_are_refused(option: str, instead: str, method: str) -> None:
    assert instead in refused({option: 1}, method=method)


@pytest.mark.parametrize("option", ["snes_rtol", "ksp_type", "pc_type", "sub_pc_type", "snes_monitor"])
@pytest.mark.parametrize("control", [{}, {"rtol": 1e-4, "step_size": None}])
def test_options_of_equations_are_refused_for_explicit_methods(option: str, control: dict[str, Any]) -> None:
    assert "explicit methods solve no equations" in refused({option: "1e-3"}, method="dopri5", **control)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("snes_rtoll", "did you mean snes_rtol?"),
        ("ksp_nonsense", "nothing reads it"),
        ("pc_factor_levls", "did you mean pc_factor_levels?"),
        ("sub_pc_type", "nothing reads it"),
        ("nonsense", "nothing reads it"),
        ("theta_endpoint", "did you mean ts_theta_endpoint?"),
        ("ts_rk_type", "nothing reads it"),
    ],
)
@pytest.mark.parametrize("control", [{}, {"rtol": 1e-3, "step_size": None}])
def test_options_that_no_solver_of_equations_reads_are_refused(
    option: str, instead: str, control: dict[str, Any]
) -> None:
    assert instead in refused({option: "1e-3"}, method="cn", **control)


@pytest.mark.parametrize("option", ["ksp_typ", "pc_typ", "snes_rtl", "ksp_max_its", "snes_linesearch_typ"])
def test_a_misspelled_option_is_refused_before_a_step_is_taken(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{option}': nothing reads it: did you mean {option[:4]}"):
        NeuralODE(Network(), method="cn", options={option: 1})(U0, TIMES[:1])


def test_a_solver_that_was_refused_stays_refused() -> None:
    node = NeuralODE(Network(), method="cn", step_size=0.2, options={"ksp_nonsense": 1})
    for _ in range(3):
        with pytest.raises(ConfigurationError, match="ksp_nonsense"):
            node(U0, TIMES)
    node.options = None
    assert torch.isfinite(node(U0, TIMES)).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cn", {"snes_rtol": 1e-10, "ksp_gmres_restart": 10, "snes_linesearch_type": "basic", "ksp_rtol": 1e-8}),
        ("cn", {"-snes_rtol": 1e-10}),
        ("theta", {"ts_theta_theta": 0.7, "ts_theta_endpoint": None}),
        ("arkimex_3", {"ts_arkimex_type": "3", "snes_type": "newtonls"}),
        ("bdf", {"ts_bdf_order": 2}),
        ("rk4", {"ts_rk_type": "4", "ts_type": "rk"}),
        ("ssp_rks2", {"ts_ssp_type": "rks3"}),
    ],
)
def test_options_that_are_heeded_are_taken(method: str, options: dict[str, Any]) -> None:
    node = NeuralODE(Network(), method=method, step_size=0.2, options=options)
    with torch.no_grad():
        assert torch.equal(node(U0, TIMES), node(U0, TIMES))


@pytest.mark.parametrize("method", ["dopri5", "arkimex_3"])
def test_options_of_step_control_are_heeded_with_error_control(method: str) -> None:
    options = {"ts_adapt_dt_max": 0.05, "ts_adapt_safety": 0.7}
    plain = NeuralODE(Network(), method=method, rtol=1e-3, atol=1e-3)
    bounded = NeuralODE(Network(), method=method, rtol=1e-3, atol=1e-3, options=options)
    found, wanted = (node(U0, TIMES).detach() for node in (bounded, plain))
    assert distance(found, wanted) <= 1e-2
    assert bounded.last_solve.forward_steps > plain.last_solve.forward_steps
    assert "nothing reads it" in refused({"ts_adapt_nonsense": 1}, method=method, rtol=1e-3)
    assert "adaptor=" in refused({"ts_adapt_type": "none"}, method=method, rtol=1e-3)


def test_tangents_of_solves_with_error_control_take_its_options() -> None:
    node = NeuralODE(Network(), rtol=1e-4, atol=1e-4, options={"ts_adapt_safety": 0.7})
    values, _ = node.jvp(U0, TIMES, torch.ones_like(U0))
    assert torch.equal(values.detach(), node(U0, TIMES).detach())


def test_options_of_pieces_of_a_preconditioner_are_read_at_the_first_solve() -> None:
    matrix = PETSc.Mat().createAIJ((6, 6), nnz=1, comm=PETSc.COMM_SELF)
    for row in range(6):
        matrix.setValue(row, row, -2.0)
    matrix.assemble()
    options = {"ksp_type": "gmres", "pc_type": "bjacobi", "sub_pc_type": "lu", "sub_ksp_type": "preonly"}
    node = NeuralODE(MatrixFunction(matrix), method="beuler", step_size=0.1, options=options)
    end = node(torch.ones(6, dtype=torch.float64), [0.0, 1.0])[-1]
    assert torch.allclose(end, torch.full((6,), 1.2**-10, dtype=torch.float64), rtol=1e-8)
    node.options = {**options, "sub_sub_pc_type": "lu"}
    with pytest.raises(ConfigurationError, match="sub_sub_pc_type"):
        node(torch.ones(6, dtype=torch.float64), [0.0, 1.0])


def test_tolerances_of_the_linear_solver_are_heeded_for_a_mat_that_would_be_factored() -> None:
    matrix = PETSc.Mat().createAIJ((2, 2), nnz=1, comm=PETSc.COMM_SELF)
    for row in range(2):
        matrix.setValue(row, row, -1.0 - row)
    matrix.assemble()
    start, func = torch.ones(2, dtype=torch.float64), MatrixFunction(matrix)
    for options in ({}, {"ksp_rtol": 1e-12}):
        end = odeint(func, start, [0.0, 1.0], method="beuler", step_size=0.1, options=options)[-1]
        assert torch.allclose(end, torch.tensor([1.1**-10, 1.2**-10], dtype=torch.float64), rtol=1e-9)
    with pytest.raises(ConfigurationError, match="ksp_rtol"):
        odeint(func, start, [0.0, 1.0], method="beuler", options={"ksp_rtol": 1e-12, "ksp_type": "preonly"})


def test_options_of_consistent_are_checked_as_well() -> None:
    mass = torch.tensor([1.0, 0.0], dtype=torch.float64)
    u0 = torch.tensor([1.0, 0.2], dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="'nonsense': nothing reads it"):
        consistent(lambda t, u: torch.stack([-u[0], u[0] - u[1]]), u0, 0.0, mass, options={"nonsense": 1})


def test_an_option_that_the_command_line_has_as_well_is_checked_all_the_same() -> None:
    with options_database({"ksp_nonsense": 1}):
        node = NeuralODE(Network(), method="cn", step_size=0.2, options={"ksp_nonsense": 2})
        with pytest.raises(ConfigurationError, match="ksp_nonsense"):
            node(U0, TIMES)
        assert PETSc.Options().getInt("ksp_nonsense") == 1
