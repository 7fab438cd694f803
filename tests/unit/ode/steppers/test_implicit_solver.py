"""Implicit solves as a user meets them: failures, tolerances, error control, consistent values, options, counters."""

from __future__ import annotations

import pytest
import torch

from pnode_dist import ConfigurationError, ConvergenceError, NeuralODE, SplitFunction, Trajectory, consistent, odeint
from pnode_dist.ode.methods import METHODS
from tests.oracles.implicit import consistent_state
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.stiff_right_hand_sides import Constrained, StiffNetwork

TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}
TIMES = [0.0, 0.3, 0.5]


def test_a_newton_solve_that_fails_is_an_error_with_petsc_s_reason() -> None:
    node = NeuralODE(StiffNetwork(), method="cn", step_size=0.1, options={"snes_max_it": 1, "snes_rtol": 1e-14})
    with pytest.raises(
        ConvergenceError, match=r"step 0 at t = 0, 0.1 long: .*DIVERGED_MAX_IT after 1 iterations"
    ) as caught:
        node(random(2, 3), TIMES)
    assert "\n" not in str(caught.value)
    # The solver is not spoilt by it.
    node.options = {}
    assert torch.isfinite(node(random(2, 3), TIMES)).all()


def test_a_krylov_solve_that_fails_is_an_error_forward_and_in_the_adjoint() -> None:
    few = {"ksp_max_it": 1, "ksp_rtol": 1e-12}
    with pytest.raises(ConvergenceError, match=r"DIVERGED_LINEAR_SOLVE.*DIVERGED_MAX_IT"):
        NeuralODE(StiffNetwork(), method="cn", step_size=0.1, options=few)(random(2, 3), TIMES)
    keep = Trajectory(ram="1MiB", keep="graph")
    node = NeuralODE(StiffNetwork(), method="cn", step_size=0.1, trajectory=keep, newton="petsc")
    loss = node(random(2, 3).requires_grad_(), TIMES).square().sum()
    stepper = next(iter(node._solvers._solvers.values())).stepper
    stepper._ts.getSNES().getKSP().setTolerances(max_it=1)  # type: ignore[attr-defined]
    with pytest.raises(ConvergenceError, match=r"the adjoint of step 4 at t = 0\.4.*transposed.*DIVERGED_MAX_IT"):
        loss.backward()


def test_a_right_hand_side_that_is_not_a_number_is_an_error() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u * float("nan")

    with pytest.raises(ConvergenceError, match="DIVERGED"):
        odeint(func, random(2, 3), TIMES, method="beuler")


def test_an_error_of_the_right_hand_side_is_raised_as_itself() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such species")

    with pytest.raises(KeyError, match="no such species"):
        odeint(func, random(2, 3), TIMES, method="cn")


@pytest.mark.parametrize("tolerance", [1e-5, 1e-8, 1e-11])
def test_the_error_of_the_gradient_follows_the_tolerance_of_the_nonlinear_solve(tolerance: float) -> None:
    func, u0 = StiffNetwork(), random(2, 3)
    parameters = list(func.parameters())

    def gradient(options: dict[str, float]) -> list[torch.Tensor]:
        node = NeuralODE(func, method="cn", step_size=0.1, options=options)
        return gradients(lambda u: node(u, TIMES), u0, parameters)

    exact = gradient(TIGHT)
    found = gradient({"snes_rtol": tolerance, "snes_stol": 0.0})
    error = max(distance(value, other) for value, other in zip(found, exact, strict=True))
    assert error < 100 * tolerance


@pytest.mark.parametrize("method", ["cn", "arkimex_3", "dirk_es324sal", "arkimex_a2"])
def test_with_error_control_the_adjoint_is_that_of_the_accepted_steps(method: str) -> None:
    func, u0 = StiffNetwork(), random(2, 3)
    problem = SplitFunction(implicit=func.stiff, explicit=func.other) if method.startswith("arkimex") else func
    parameters = list(func.parameters())
    node = NeuralODE(problem, method=method, rtol=1e-2, atol=1e-2, options=TIGHT)
    states = node(u0, TIMES)
    assert node.last_solve.forward_steps > 2
    reference = NeuralODE(func, rtol=1e-8, atol=1e-10)(u0, TIMES)
    assert distance(states, reference) < 1e-1
    found = gradients(lambda u: node(u, TIMES), u0, parameters)
    few = NeuralODE(problem, method=method, rtol=1e-2, atol=1e-2, options=TIGHT, trajectory=Trajectory(ram_slots=4))
    again = gradients(lambda u: few(u, TIMES), u0, parameters)
    assert few.last_solve.recomputed_steps > 0
    for value, other in zip(found, again, strict=True):
        assert torch.equal(value, other)


def test_a_method_without_an_error_estimate_is_refused_with_tolerances() -> None:
    for method in ("arkimex_ars443", "theta", "bdf"):
        with torch.no_grad(), pytest.raises(ConfigurationError, match="has no error estimate"):
            NeuralODE(Network(), method=method, rtol=1e-3)(random(2, 3), TIMES)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.adjoint == "none"])
def test_methods_without_an_adjoint_solve_forward_and_refuse_a_gradient(method: str) -> None:
    u0 = random(2, 3)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -3 * u + torch.tanh(u.roll(1, -1))

    reference = odeint(func, u0, [0.0, 0.5], rtol=1e-11, atol=1e-12)[-1]
    errors = [distance(odeint(func, u0, [0.0, 0.5], method=method, step_size=h)[-1], reference) for h in (0.05, 0.025)]
    order = METHODS[method].order
    assert errors[0] / errors[1] > 2 ** (order - 0.5) or errors[1] < 1e-9
    with pytest.raises(ConfigurationError, match=rf"method = '{method}': PETSc has no discrete adjoint"):
        odeint(func, u0.requires_grad_(), [0.0, 0.5], method=method)


def test_consistent_values_solve_the_algebraic_equations_and_carry_their_derivatives() -> None:
    func, mass = Constrained(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    u0 = random(4, 3).requires_grad_()
    found = consistent(func, u0, 0.3, mass.expand(4, 3), options=TIGHT)
    assert torch.equal(found[:, :2], u0[:, :2])
    assert func.constraint(torch.tensor(0.3, dtype=torch.float64), found).abs().max() < 1e-12
    wanted = consistent_state(func, u0, 0.3, torch.diag(mass.repeat(4)))
    inputs = [u0, func.weight]
    for value, other in zip(
        torch.autograd.grad(found.pow(3).sum(), inputs), torch.autograd.grad(wanted.pow(3).sum(), inputs), strict=True
    ):
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigurationError, match="no row of zeros"):
        consistent(func, u0, 0.0, torch.ones(4, 3))


def test_consistent_values_have_tangents_in_the_parameters_of_func() -> None:
    func, mass = Constrained(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).expand(4, 3)
    u0, weight = random(4, 3), func.weight.detach().clone()
    direction, cotangent = torch.ones_like(weight), random(4, 3)

    class Consistent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.func = func

        def forward(self) -> torch.Tensor:
            result: torch.Tensor = consistent(self.func, u0, 0.3, mass, options=TIGHT)
            return result

    def found(value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(Consistent(), {"func.weight": value}, ())
        return result

    _, tangent = torch.func.jvp(found, (weight,), (direction,))
    leaf = weight.requires_grad_()
    (gradient,) = torch.autograd.grad((cotangent * found(leaf)).sum(), leaf)
    assert (cotangent * tangent).sum().item() == pytest.approx((gradient * direction).sum().item(), rel=1e-10)
    assert tangent[:, 2].abs().min() > 0


def test_a_mass_matrix_is_refused_where_the_adjoint_takes_none() -> None:
    for method in ("arkimex_3", "dirk_s212", "rk4"):
        with pytest.raises(ConfigurationError, match=f"mass: method = {method!r}.*beuler, cn, theta"):
            odeint(Network(), random(2, 3), TIMES, method=method, mass=torch.ones(2, 3))
    with pytest.raises(
        ConfigurationError, match=r"mass: shape \(3, 2\): must be that of the state, \(2, 3\), or \(3, 3\)"
    ):
        odeint(Network(), random(2, 3), TIMES, method="cn", mass=torch.ones(3, 2))


def test_the_options_of_petsc_s_solvers_are_the_user_s() -> None:
    func, u0 = StiffNetwork(), random(2, 3)
    once = NeuralODE(func, method="cn", step_size=0.1, options={"snes_type": "ksponly", "ksp_type": "bcgs"})
    once(u0, TIMES)
    assert once.last_solve.newton_iterations == once.last_solve.forward_steps
    with pytest.raises(ConfigurationError, match="petsc options: "):
        odeint(func, u0, TIMES, method="cn", options={"ksp_type": "gauss"})
    with pytest.raises(ConfigurationError, match="ts_type = 'bdf': must be 'cn'"):
        odeint(func, u0, TIMES, method="cn", options={"ts_type": "bdf"})


def test_theta_is_any_theta_by_petsc_s_options() -> None:
    func, u0 = StiffNetwork(), random(2, 3)
    endpoint = {**TIGHT, "ts_theta_theta": 0.5, "ts_theta_endpoint": None}
    assert (
        distance(
            odeint(func, u0, TIMES, method="theta", step_size=0.1, options=endpoint),
            odeint(func, u0, TIMES, method="cn", step_size=0.1, options=TIGHT),
        )
        < 1e-12
    )
    implicit = {**TIGHT, "ts_theta_theta": 1.0}
    assert (
        distance(
            odeint(func, u0, TIMES, method="theta", step_size=0.1, options=implicit),
            odeint(func, u0, TIMES, method="beuler", step_size=0.1, options=TIGHT),
        )
        < 1e-12
    )


def test_stages_that_were_kept_spare_the_nonlinear_solves_of_the_backward_pass() -> None:
    func, u0 = StiffNetwork(), random(2, 3).requires_grad_()
    counts = {}
    for keep in ("solution", "stages", "graph"):
        slots = {"ram": "1MiB"} if keep != "solution" else {"ram_slots": 3}
        node = NeuralODE(func, method="cn", step_size=0.05, trajectory=Trajectory(keep=keep, **slots))
        loss = node(u0, TIMES).square().sum()
        forward = node.last_solve.newton_iterations
        loss.backward()
        counts[keep] = node.last_solve.newton_iterations - forward
    assert counts["stages"] == counts["graph"] == 0
    assert counts["solution"] > 0


def test_single_precision_functions_are_solved_to_their_own_precision() -> None:
    func = StiffNetwork(dtype=torch.float32)
    double = StiffNetwork()
    double.load_state_dict({name: value.double() for name, value in func.state_dict().items()})
    u0 = random(2, 3)
    single = odeint(func, u0.float(), TIMES, method="cn", step_size=0.1)
    assert single.dtype == torch.float32
    assert distance(single.double(), odeint(double, u0, TIMES, method="cn", step_size=0.1)) < 1e-5
