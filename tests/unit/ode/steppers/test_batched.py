"""Implicit steps of small independent systems as a batch: values, gradients, and the choice of this path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, ConvergenceError, NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.steppers.batched import BatchedStepper
from pnode_dist.ode.steppers.implicit import ImplicitStepper
from pnode_dist.ode.steppers.irk.stepper import IrkStepper
from tests.oracles.implicit import Theta, odeint_implicit
from tests.oracles.right_hand_sides import distance, gradients, identical, random
from tests.oracles.stiff_right_hand_sides import Constrained, StiffNetwork
from tests.tiers import at_night
from tests.unit.ode.steppers.test_implicit_gradients import (
    MASS_METHODS,
    MASSES,
    OF_EACH_KIND,
    ORACLES,
    SINGULAR,
    STEP_SIZE,
    TIMES,
    agree,
    consistent_state,
    dense_mass,
    split,
)

# Newton's method to rounding.
TIGHT = {"snes_rtol": 1e-14, "snes_atol": 1e-15, "snes_stol": 1e-15}
OF_PETSC = {**TIGHT, "snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-13, "ksp_atol": 1e-50}


class Coupled(nn.Module):
    """du/dt = -rates (u + strength(t) mean of all samples)."""

    def __init__(self, begins: float = -1.0) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.0, 6.0, 30.0], dtype=torch.float64))
        self.begins = begins

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        strength = (t > self.begins).to(u)
        return -self.rates * (u + 0.3 * strength * torch.tanh(u.mean(0)))


def stepper_of(node: NeuralODE) -> Any:
    (solver,) = node._solvers._solvers.values()
    return solver.stepper


@pytest.mark.parametrize("name", ORACLES)
def test_values_and_gradients_are_those_of_plain_torch_to_rounding(name: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    parameters, times = list(network.parameters()), TIMES[:2] if METHODS[name].stages > 4 else TIMES
    node = NeuralODE(network, method=name, step_size=STEP_SIZE, options=TIGHT, newton="batch")
    found = gradients(lambda u: node(u, times), u0, parameters)
    wanted = gradients(lambda u: odeint_implicit(network, u, times, ORACLES[name], STEP_SIZE), u0, parameters)
    assert agree(found, wanted, 1e-12)
    assert isinstance(stepper_of(node), BatchedStepper)


@pytest.mark.parametrize("name", [name for name in ORACLES if name.startswith("arkimex")])
def test_a_split_function_has_the_values_and_gradients_of_plain_torch(name: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    parameters = list(network.parameters())

    def plain(u: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(network.stiff, u, TIMES[:2], ORACLES[name], STEP_SIZE, explicit=network.other)

    def solve(u: torch.Tensor) -> torch.Tensor:
        function = split(network)
        return odeint(function, u, TIMES[:2], method=name, step_size=STEP_SIZE, options=TIGHT, newton="batch")

    assert agree(gradients(solve, u0, parameters), gradients(plain, u0, parameters), 1e-12)


@pytest.mark.parametrize("name", at_night(ORACLES, OF_EACH_KIND))
def test_values_and_gradients_are_those_of_petsc_s_path(name: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    parameters = list(network.parameters())

    def solve(newton: str, options: dict[str, Any]) -> list[torch.Tensor]:
        node = NeuralODE(split(network), method=name, step_size=STEP_SIZE, options=options, newton=newton)
        return gradients(lambda u: node(u, TIMES[:2]), u0, parameters)

    assert agree(solve("batch", TIGHT), solve("petsc", OF_PETSC), 1e-11)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_the_default_tolerances_bound_the_difference_to_petsc_s_path(name: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    parameters = list(network.parameters())
    found, wanted = (
        gradients(lambda u, n=newton: odeint(network, u, TIMES, method=name, step_size=0.1, newton=n), u0, parameters)
        for newton in ("batch", "petsc")
    )
    # Each stage leaves 1e-9 of its first residual, and the gradient is that of all stages.
    assert agree(found, wanted, 1e-7)


@pytest.mark.parametrize("name", ["beuler", "cn", "arkimex_3", "dirk_es324sal", "gauss4", "radau5"])
def test_times_may_run_backward_and_have_gradients(name: str) -> None:
    network, u0 = StiffNetwork(), 0.1 * random(2, 3)
    times = torch.tensor([0.3, 0.25, 0.2], dtype=torch.float64, requires_grad=True)

    def loss(states: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(torch.sin(states).sum(), times)
        return found

    function = split(network) if name.startswith("arkimex") else network
    states = odeint(function, u0, times, method=name, options=TIGHT, newton="batch")
    explicit = network.other if name.startswith("arkimex") else None
    plain = odeint_implicit(network.stiff if explicit else network, u0, times, ORACLES[name], explicit=explicit)
    assert distance(states, plain) <= 1e-12
    assert distance(loss(states), loss(plain)) <= 1e-12


@pytest.mark.parametrize("kind", MASSES)
@pytest.mark.parametrize("chosen", MASS_METHODS)
def test_a_mass_matrix_is_that_of_plain_torch(chosen: str, kind: str) -> None:
    name, options, method = MASS_METHODS[chosen]
    network, u0 = StiffNetwork(), random(2, 3)
    parameters, keywords = list(network.parameters()), {"mass": MASSES[kind], "newton": "batch"}

    def solve(u: torch.Tensor) -> torch.Tensor:
        given = {**TIGHT, **options}
        return odeint(network, u, TIMES, method=name, step_size=STEP_SIZE, options=given, **keywords)  # type: ignore[arg-type]

    dense = dense_mass(MASSES[kind])
    wanted = gradients(lambda u: odeint_implicit(network, u, TIMES, method, STEP_SIZE, mass=dense), u0, parameters)
    assert agree(gradients(solve, u0, parameters), wanted, 1e-12)


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("chosen", MASS_METHODS)
def test_algebraic_equations_are_solved_and_differentiated_through(chosen: str, kind: str) -> None:
    name, options, method = MASS_METHODS[chosen]
    constrained, dense = Constrained(), dense_mass(SINGULAR[kind])
    parameters = list(constrained.parameters())
    start = consistent_state(constrained, random(2, 3), 0.0, dense).detach()

    def solve(u: torch.Tensor) -> torch.Tensor:
        given, mass = {**TIGHT, **options}, SINGULAR[kind]
        return odeint(constrained, u, TIMES, method=name, step_size=STEP_SIZE, options=given, mass=mass, newton="batch")

    def plain(u: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(constrained, u, TIMES, method, STEP_SIZE, mass=dense)

    assert agree(gradients(solve, start, parameters), gradients(plain, start, parameters), 1e-11)


@pytest.mark.parametrize("name", ["cn", "theta", "arkimex_3", "dirk_es213sal", "radau5"])
def test_the_gradient_has_the_same_bits_under_every_budget(name: str) -> None:
    network, u0 = StiffNetwork(), random(4, 3)

    def gradient(trajectory: Trajectory) -> tuple[torch.Tensor, ...]:
        node = NeuralODE(split(network), method=name, step_size=0.1, trajectory=trajectory, newton="batch")
        return gradients(lambda u: node(u, TIMES), u0, list(network.parameters()))

    wanted = gradient(Trajectory(keep="solution"))
    for trajectory in (Trajectory(keep="stages"), Trajectory(keep="graph"), Trajectory(ram_slots=0, disk_slots=2)):
        assert identical(gradient(trajectory), wanted), trajectory


def test_a_sample_has_the_same_result_beside_other_samples() -> None:
    network, u0 = StiffNetwork(), random(4, 3)
    whole = odeint(network, u0, TIMES, method="beuler", step_size=0.1, newton="batch")
    for number in range(4):
        one = odeint(network, u0[number : number + 1], TIMES, method="beuler", step_size=0.1, newton="batch")
        assert distance(one, whole[:, number : number + 1]) <= 1e-9


@pytest.mark.parametrize("name", ["beuler", "dirk_es324sal", "sdirk2", "kvaerno4", "kvaerno5", "arkimex_3"])
def test_the_error_of_a_smaller_step_falls_with_the_order(name: str) -> None:
    network, u0 = StiffNetwork(), random(2, 3)
    exact = odeint(network, u0, [0.0, 0.05], method="dopri8", rtol=1e-12, atol=1e-13)[-1]

    def error(size: float) -> float:
        options = {**TIGHT}
        states = odeint(network, u0, [0.0, 0.05], method=name, step_size=size, options=options, newton="batch")
        return distance(states[-1], exact)

    assert math.log2(error(0.0025) / error(0.00125)) == pytest.approx(METHODS[name].order, abs=0.35)


def test_a_state_in_parts_and_a_state_of_one_axis_are_batches_too() -> None:
    network, u0 = StiffNetwork(), random(4, 3)

    def in_parts(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values = network(t, torch.cat([u[0][:, None], u[1]], 1))
        return values[:, 0], values[:, 1:]

    keywords: dict[str, Any] = {"method": "cn", "step_size": 0.1, "options": TIGHT, "newton": "batch"}
    whole = odeint(network, u0, TIMES, **keywords)
    first, rest = odeint(in_parts, (u0[:, 0], u0[:, 1:]), TIMES, **keywords)
    assert distance(torch.cat([first[..., None], rest], -1), whole) <= 1e-13
    assert distance(odeint(network, u0[0], TIMES, **keywords), whole[:, 0]) <= 1e-13


def test_float32_functions_are_solved_to_their_own_precision() -> None:
    network = StiffNetwork()
    u0, parameters = random(4, 3), list(network.parameters())

    def solve(u: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        return odeint(network, u, TIMES, method="cn", step_size=0.1, compute_dtype=dtype, newton="batch")

    found = gradients(lambda u: solve(u, torch.float32), u0, parameters)
    assert agree(found, gradients(lambda u: solve(u, None), u0, parameters), 1e-4)


@pytest.mark.parametrize("name", ["beuler", "dirk_s212", "gauss4"])
def test_samples_that_depend_on_one_another_are_left_to_petsc(name: str) -> None:
    coupled, u0 = Coupled(), random(4, 3)
    node = NeuralODE(coupled, method=name, step_size=0.1)
    parameters = list(coupled.parameters())
    found = gradients(lambda u: node(u, TIMES), u0, parameters)
    wanted = gradients(lambda u: odeint(coupled, u, TIMES, method=name, step_size=0.1, newton="petsc"), u0, parameters)
    assert identical(found, wanted)
    assert isinstance(stepper_of(node), BatchedStepper)
    assert node.last_solve.linear_iterations > 0
    with pytest.raises(ConfigurationError, match=r"newton = 'batch': the derivative of func has entries between"):
        odeint(coupled, u0, TIMES, method=name, newton="batch")


def test_a_coupling_that_begins_later_has_the_exact_gradient() -> None:
    coupled, u0 = Coupled(begins=0.25), random(4, 3)
    parameters = list(coupled.parameters())

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(coupled, u, TIMES, method="cn", step_size=0.1, options=TIGHT, newton="batch")

    wanted = gradients(lambda u: odeint_implicit(coupled, u, TIMES, ORACLES["cn"], 0.1), u0, parameters)
    assert agree(gradients(solve, u0, parameters), wanted, 1e-12)


def test_a_coupling_too_strong_to_refine_is_an_error_of_the_adjoint() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u + 30 * (t > 0.25).to(u) * torch.sin(u.roll(1, 0))

    # At this equilibrium Newton's method has nothing to solve, and the adjoint a coupled system.
    u0 = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    states = odeint(func, u0, [0.0, 0.2, 0.4], method="beuler", newton="batch")
    with pytest.raises(ConvergenceError, match=r"^the adjoint of step 1 at t = 0\.2.*depend on one another"):
        (states * random(4, 3)).sum().backward()


def test_newton_s_method_that_fails_is_an_error_with_petsc_s_reason() -> None:
    node = NeuralODE(StiffNetwork(), method="cn", step_size=0.1, newton="batch")
    node.options = {"snes_max_it": 1, "snes_rtol": 1e-14}
    with pytest.raises(
        ConvergenceError, match=r"^step 0 at t = 0, 0\.1 long: .*DIVERGED_MAX_IT after 1 iterations"
    ) as caught:
        node(random(2, 3), TIMES)
    assert "\n" not in str(caught.value)
    node.options = {}
    assert torch.isfinite(node(random(2, 3), TIMES)).all()
    for value, compile in ((math.nan, False), (math.inf, False), (math.inf, "aot_eager")):
        wrong = NeuralODE(lambda t, u, v=value: -u * v, method="beuler", newton="batch", compile=compile)
        with pytest.raises(ConvergenceError, match="DIVERGED_FUNCTION_NANORINF"):
            wrong(random(2, 3), TIMES)


def test_one_sample_that_fails_fails_the_step() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 1 + u**2

    u0 = torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    with pytest.raises(ConvergenceError, match=r"DIVERGED_(MAX_IT|LINE_SEARCH)"):
        odeint(func, u0, [0.0, 1.0], method="beuler", step_size=1.0, newton="batch")


def test_a_step_too_long_for_newton_s_method_is_halved() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -50 * torch.atan(10 * u)

    u0 = torch.tensor([[3.0], [0.01], [-2.0]], dtype=torch.float64)
    ends = odeint(func, u0, [0.0, 1.0], method="beuler", step_size=1.0, newton="batch")[-1]
    residual = ends - u0 - func(torch.zeros(()), ends)
    assert residual.abs().max() <= 1e-7


def test_an_error_of_the_right_hand_side_is_raised_as_itself() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such species")

    with pytest.raises(KeyError, match="no such species"):
        odeint(func, random(2, 3), TIMES, method="cn", newton="batch")


def test_a_function_may_return_the_same_memory_each_time() -> None:
    memory, network, u0 = torch.empty(4, 3, dtype=torch.float64), StiffNetwork(), random(4, 3)

    def in_memory(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        values = network(t, u)
        return values if torch.is_grad_enabled() else memory.copy_(values)

    with torch.no_grad():
        for name in ("cn", "arkimex_3", "dirk_es324sal"):
            found, wanted = (
                odeint(SplitFunction(implicit=f, explicit=f), u0, TIMES, method=name, step_size=0.1, newton="batch")
                for f in (in_memory, network)
            )
            assert torch.equal(found, wanted), name


def test_a_converged_sample_with_a_singular_block_is_left_alone() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # At 0 the value is 0, and 1 - h df/du is 0 for h = 1.
        return torch.sin(u)

    u0 = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
    ends = odeint(func, u0, [0.0, 1.0], method="beuler", step_size=1.0, newton="batch")[-1]
    assert ends[0] == 0.0
    assert abs(ends[1] - 0.5 - torch.sin(ends[1])) <= 1e-8


def test_the_random_state_is_that_of_before() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    odeint(StiffNetwork(), random(4, 3), TIMES, method="cn", newton="batch")
    assert torch.equal(torch.rand(3), wanted)


def test_an_operation_without_a_rule_for_batches_is_differentiated_in_turn() -> None:
    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(u)
            return -(u**3)

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
            (u,) = ctx.saved_tensors
            return torch.from_numpy((-3 * u**2 * cotangents[0]).numpy())

    def cubed(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -(u**3)

    u0 = random(3, 2)
    keywords: dict[str, Any] = {"method": "cn", "step_size": 0.1, "options": TIGHT, "newton": "batch"}
    found, wanted = (
        gradients(lambda u, f=f: odeint(f, u, TIMES, **keywords), u0, [])  # type: ignore[misc]
        for f in (lambda t, u: Plain.apply(u), cubed)
    )
    assert agree(found, wanted, 1e-13)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"method": "rk4"}, "method = 'rk4' is explicit and solves no equations: must be 'auto'"),
        ({"method": "bdf"}, "method = 'bdf' is not of the families theta, arkimex, dirk or irk: must be 'auto' or"),
        ({"compute_dtype": torch.bfloat16}, r"f computes in torch\.bfloat16, too coarse to tell samples apart"),
        ({"rtol": 1e-3}, r"steps with error control \(rtol, atol\) are PETSc's"),
        ({"preconditioner": "block"}, "a preconditioner is for PETSc's linear solvers"),
        ({"options": {"ksp_rtol": 1e-9}}, r"options of PETSc's solvers are given \(ksp_rtol\)"),
        ({"options": {"ts_monitor": None}}, r"options of PETSc's solvers are given \(ts_monitor\)"),
    ],
)
def test_where_a_batch_is_impossible_the_reason_is_one_line(keywords: dict[str, Any], reason: str) -> None:
    with torch.no_grad(), pytest.raises(ConfigurationError, match=f"^newton = 'batch': {reason}") as caught:
        odeint(StiffNetwork(), random(2, 3), TIMES, **{"method": "cn", **keywords}, newton="batch")
    assert "\n" not in str(caught.value)


def test_samples_of_too_many_components_and_unknown_values_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="newton = 'newton': must be one of auto, batch, petsc"):
        odeint(StiffNetwork(), random(2, 3), TIMES, method="cn", newton="newton")
    with pytest.raises(ConfigurationError, match="a sample has 49 components: must be 1 to 48"):
        odeint(lambda t, u: -u, random(2, 49), TIMES, method="cn", newton="batch")


@pytest.mark.parametrize(
    ("keywords", "kind"),
    [
        ({}, BatchedStepper),
        ({"newton": "petsc"}, ImplicitStepper),
        ({"options": {"snes_rtol": 1e-12}}, BatchedStepper),
        ({"options": {"ksp_rtol": 1e-12}}, ImplicitStepper),
        ({"preconditioner": "block"}, ImplicitStepper),
        ({"method": "radau5"}, BatchedStepper),
        ({"method": "radau5", "newton": "petsc"}, IrkStepper),
    ],
)
def test_auto_is_a_batch_unless_something_of_petsc_s_is_given(keywords: dict[str, Any], kind: type) -> None:
    node = NeuralODE(StiffNetwork(), **{"method": "cn", "step_size": 0.1, **keywords})
    node(random(2, 3), TIMES)
    assert type(stepper_of(node)) is kind


def test_theta_and_the_table_are_chosen_by_petsc_s_options() -> None:
    network, u0 = StiffNetwork(), random(2, 3)

    def solve(method: str, **options: Any) -> torch.Tensor:
        return odeint(network, u0, TIMES, method=method, step_size=0.1, options={**TIGHT, **options}, newton="batch")

    wanted = odeint_implicit(network, u0, TIMES, Theta(0.6, endpoint=True), 0.1)
    assert distance(solve("theta", ts_theta_theta=0.6, ts_theta_endpoint=None), wanted) <= 1e-12
    assert torch.equal(solve("dirk_s212", ts_dirk_type="es213sal"), solve("dirk_es213sal"))


def test_newton_iterations_are_counted_and_there_are_no_linear_ones() -> None:
    node = NeuralODE(StiffNetwork(), method="beuler", step_size=0.1)
    node(random(2, 3), TIMES).sum().backward()
    solve = node.last_solve
    assert 5 <= solve.newton_iterations <= 60
    assert solve.linear_iterations == solve.adjoint_linear_iterations == 0


def test_a_hessian_vector_product_is_that_of_petsc_s_path() -> None:
    network, u0 = StiffNetwork(), random(2, 3)

    def product(newton: str) -> torch.Tensor:
        node = NeuralODE(network, method="cn", step_size=0.1, last_only=True, newton=newton)
        states, tangents = node.jvp(u0, TIMES, torch.ones_like(u0))
        (found,) = torch.autograd.grad(tangents.square().sum() + states.sum(), network.stiff.drive)
        return found

    assert distance(product("auto"), product("petsc")) <= 1e-8


def test_a_split_function_with_an_unused_part_has_its_gradient() -> None:
    network, u0 = StiffNetwork(), random(2, 3)
    function = SplitFunction(implicit=network.stiff, explicit=lambda t, u: torch.ones_like(u))
    (found,) = torch.autograd.grad(
        odeint(function, u0, TIMES, method="arkimex_ars443", step_size=0.1, newton="batch").sum(), network.stiff.drive
    )
    assert torch.isfinite(found).all()
