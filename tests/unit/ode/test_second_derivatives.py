"""Second and third derivatives of a solve, against plain back-propagation through its steps."""

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.nn import Conv2d
from pnode_dist.ode.steppers.preconditioner import Approximate, UserPC
from tests.oracles.differences import directional_derivative
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.tiers import at_night

TIMES = [0.0, 0.4, 1.0]
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "snes_stol": 1e-15, "ksp_rtol": 1e-13}
BUDGETS = [
    Trajectory(ram="1MiB", keep="graph"),
    Trajectory(ram="1MiB", keep="stages"),
    Trajectory(ram="1MiB", keep="solution"),
    Trajectory(ram_slots=1),
    Trajectory(ram_slots=1, disk_slots=1),
]
Solver = Callable[..., Any]


def penalised(solve: Solver, u0: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    """A loss with a penalty on its gradient by state and parameters."""
    states = solve(u0)
    loss = torch.sin(states).sum()
    found = torch.autograd.grad(loss, [u0, *parameters], create_graph=True)
    return loss + sum((part**3).sum() for part in found)


def derivatives(solve: Solver, u0: torch.Tensor, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    start = u0.detach().clone().requires_grad_()
    return torch.autograd.grad(penalised(solve, start, parameters), [start, *parameters])


def decay(rate: torch.Tensor) -> torch.Tensor:
    """exp(-rate), by a solve."""
    u0 = torch.ones(1, dtype=torch.float64)
    return odeint(lambda t, u: -rate * u, u0, [0.0, 1.0], step_size=0.01)[-1].sum()


def test_the_hessian_of_a_decay_by_its_rate_is_that_of_the_exponential() -> None:
    found = torch.autograd.functional.hessian(decay, torch.tensor(1.0, dtype=torch.float64))
    assert found.item() == pytest.approx(0.3679, abs=5e-5)


def test_a_penalty_on_the_gradient_counts() -> None:
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    states = decay(rate)
    (slope,) = torch.autograd.grad(states, rate, create_graph=True)
    (found,) = torch.autograd.grad(states + 100 * slope.square(), rate)
    assert found.item() == pytest.approx(-27.43, abs=6e-3)


@pytest.mark.parametrize("trajectory", BUDGETS, ids=lambda budget: f"{budget.keep}-{budget.ram}-{budget.ram_slots}")
@pytest.mark.parametrize(("method", "table"), [("rk4", "4"), ("dopri5", "5dp"), ("euler", "1fe")])
def test_explicit_second_derivatives_are_those_of_the_plain_steps(
    method: str, table: str, trajectory: Trajectory
) -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    node = NeuralODE(network, method=method, step_size=0.1, trajectory=trajectory)
    found = derivatives(lambda u: node(u, TIMES), u0, parameters)
    plain = derivatives(lambda u: odeint_plain(network, u, TIMES, TABLEAUX[table], 0.1), u0, parameters)
    assert distance(found, plain) <= 1e-12


@pytest.mark.parametrize("times", [TIMES[::-1], [0.0, 0.35], [0.5]])
@pytest.mark.parametrize("last_only", [False, True])
def test_second_derivatives_are_right_for_any_output_times(times: list[float], last_only: bool) -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())

    def plain(u: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = odeint_plain(network, u, times, TABLEAUX["4"], 0.1)
        return states[-1] if last_only else states

    def wanted(solve: Solver) -> tuple[torch.Tensor | None, ...]:
        start = u0.detach().clone().requires_grad_()
        loss = torch.sin(solve(start)).sum()
        (slope,) = torch.autograd.grad(loss, start, create_graph=True)
        found = torch.autograd.grad(
            loss + (slope**3).sum(), [start, *parameters], allow_unused=True, materialize_grads=True
        )
        return tuple(found)

    node = NeuralODE(network, step_size=0.1, last_only=last_only)
    assert distance(wanted(lambda u: node(u, times)), wanted(plain)) <= 1e-12


def test_a_state_of_several_parts_has_second_derivatives() -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())

    def pair(t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return network(t, u[0]) + u[1], torch.sin(u[0]) * u[1]

    def joined(states: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in states])

    found = derivatives(lambda u: joined(odeint(pair, (u, 2 * u), TIMES, step_size=0.1)), u0, parameters)
    plain = derivatives(lambda u: joined(odeint_plain(pair, (u, 2 * u), TIMES, TABLEAUX["4"], 0.1)), u0, parameters)
    assert distance(found, plain) <= 1e-12


def test_a_third_derivative_is_that_of_the_plain_steps() -> None:
    network, u0 = Network(), random(1, 3)
    parameters = list(network.parameters())

    def third(solve: Solver) -> tuple[torch.Tensor, ...]:
        start = u0.detach().clone().requires_grad_()
        (one,) = torch.autograd.grad(torch.sin(solve(start)).sum(), start, create_graph=True)
        two = torch.autograd.grad(one.square().sum(), [start, *parameters], create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in two), [start, *parameters])

    found = third(lambda u: odeint(network, u, TIMES, step_size=0.2))
    assert distance(found, third(lambda u: odeint_plain(network, u, TIMES, TABLEAUX["4"], 0.2))) <= 1e-12


def test_second_derivatives_may_be_asked_for_again() -> None:
    network, start = Network(), random(2, 3).requires_grad_()
    parameters = list(network.parameters())
    value = penalised(lambda u: odeint(network, u, TIMES, step_size=0.1), start, parameters)
    first = torch.autograd.grad(value, [start, *parameters], retain_graph=True)
    second = torch.autograd.grad(value, [start, *parameters])
    assert distance(second, first) == 0.0


@pytest.mark.parametrize("method", ["cn", "beuler", "arkimex_3", "dirk_s212"])
@pytest.mark.parametrize("keep", at_night(["graph", "stages", "solution"], but=["solution"]))
def test_implicit_second_derivatives_are_those_of_difference_quotients(method: str, keep: str) -> None:
    network: nn.Module = Network()
    if method.startswith("arkimex"):
        network = SplitFunction(implicit=Network(seed=1), explicit=Network(seed=2))
    u0 = random(1, 3)
    parameters = list(network.parameters())
    node = NeuralODE(network, method=method, step_size=0.2, options=TIGHT, trajectory=Trajectory(keep=keep))
    found = derivatives(lambda u: node(u, TIMES), u0, parameters)
    along = [random(*value.shape, seed=7) for value in (u0, *parameters)]

    def value(state: torch.Tensor, *moved: torch.Tensor) -> torch.Tensor:
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, new in zip(parameters, moved, strict=True):
            parameter.data.copy_(new)
        with torch.enable_grad():
            result = penalised(lambda u: node(u, TIMES), state.detach().clone().requires_grad_(), parameters).detach()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data.copy_(old)
        return result

    wanted = directional_derivative(value, [u0, *parameters], along)
    slope = sum((part * direction).sum() for part, direction in zip(found, along, strict=True))
    assert slope.item() == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_gradgradcheck_finds_nothing(method: str) -> None:
    weight, u0 = random(2, 2, seed=3).requires_grad_(), random(2).requires_grad_()

    def solve(u: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return odeint(
            lambda t, x: torch.tanh(matrix @ x), u, [0.0, 0.5], step_size=0.25, method=method, options=options
        )

    options = TIGHT if method == "cn" else {}
    assert torch.autograd.gradcheck(solve, (u0, weight))
    assert torch.autograd.gradgradcheck(solve, (u0, weight))


def test_with_error_control_the_accepted_steps_are_differentiated_twice() -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    node = NeuralODE(network, method="dopri5", rtol=1e-3, atol=1e-4)
    node(u0, TIMES)
    found = derivatives(lambda u: node(u, TIMES), u0, parameters)
    grid = node(u0.clone().requires_grad_(), TIMES).grad_fn.call.last.solve.grid
    steps = [*grid.starts, TIMES[-1]]
    assert len(steps) > 3
    outputs = sorted(grid.outputs)

    def plain(u: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = odeint_plain(network, u, steps, TABLEAUX["5dp"])
        return states[outputs]

    assert distance(found, derivatives(plain, u0, parameters)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrow_state_or_computation_has_second_derivatives_to_its_precision(dtype: torch.dtype) -> None:
    network, u0 = Network(dtype=dtype), random(2, 3, dtype=dtype)
    parameters = list(network.parameters())
    node = NeuralODE(network, step_size=0.1, compute_dtype=torch.float32)
    found = derivatives(lambda u: node(u, TIMES), u0, parameters)
    wide = Network()
    wide.load_state_dict(network.state_dict())
    plain = derivatives(
        lambda u: odeint_plain(wide, u, TIMES, TABLEAUX["4"], 0.1), u0.double(), list(wide.parameters())
    )
    assert all(part.dtype is dtype for part in found)
    assert distance([part.double() for part in found], plain) <= 1e-4


def test_a_parameter_computed_before_the_solve_has_second_derivatives() -> None:
    u0 = random(2, 3)
    weight = random(3, 3, seed=2).requires_grad_()

    def solving(solver: Solver) -> Solver:
        def solve(u: torch.Tensor) -> torch.Tensor:
            scaled = torch.sin(weight)
            return solver(lambda t, x: torch.tanh(x @ scaled), u)

        return solve

    found = derivatives(solving(lambda f, u: odeint(f, u, TIMES, step_size=0.1)), u0, [weight])
    plain = derivatives(solving(lambda f, u: odeint_plain(f, u, TIMES, TABLEAUX["4"], 0.1)), u0, [weight])
    assert distance(found, plain) <= 1e-12


def test_a_mass_matrix_counts_in_second_derivatives() -> None:
    u0 = random(3)
    mass = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    network = Network()
    parameters = list(network.parameters())
    found = derivatives(
        lambda u: odeint(network, u, TIMES, step_size=0.1, method="cn", mass=mass, options=TIGHT), u0, parameters
    )

    def scaled(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return network(t, u) / mass

    wanted = derivatives(lambda u: odeint(scaled, u, TIMES, step_size=0.1, method="cn", options=TIGHT), u0, parameters)
    assert distance(found, wanted) <= 1e-9


class Normalised(nn.Module):
    """A right-hand side with a norm whose third derivatives torch does not have right."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        norms = {"layer": nn.LayerNorm(3), "batch": nn.BatchNorm1d(3), "instance": nn.InstanceNorm1d(4)}
        # A bias before a norm has no effect, and a gradient of rounding alone.
        self.layers = nn.Sequential(nn.Linear(3, 3, bias=False), norms[norm], nn.Tanh(), nn.Linear(3, 3)).double()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rate: torch.Tensor = self.layers(u)
        return rate


@pytest.mark.parametrize(
    ("norm", "method"), [("layer", "rk4"), ("batch", "rk4"), ("instance", "rk4"), ("layer", "cn"), ("instance", "cn")]
)
def test_norms_in_f_have_second_derivatives(norm: str, method: str) -> None:
    func, u0 = Normalised(norm), random(4, 3)
    parameters = list(func.parameters())
    node = NeuralODE(func, method=method, step_size=0.1, options=TIGHT if method == "cn" else None)
    found = derivatives(lambda u: node(u, TIMES), u0, parameters)
    if method == "rk4":
        wanted = derivatives(lambda u: odeint_plain(func, u, TIMES, TABLEAUX["4"], 0.1), u0, parameters)
        assert distance(found, wanted) <= 1e-11
        return
    along = random(4, 3, seed=7)

    def value(state: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            start = state.detach().clone().requires_grad_()
            return penalised(lambda u: node(u, TIMES), start, parameters).detach()

    slope = (found[0] * along).sum().item()
    assert slope == pytest.approx(directional_derivative(value, [u0], [along]), rel=1e-6)


def diagonal(*entries: float) -> PETSc.Mat:
    matrix = PETSc.Mat().createAIJ((len(entries), len(entries)), comm=PETSc.COMM_SELF)
    matrix.setUp()
    for number, entry in enumerate(entries):
        matrix.setValue(number, number, entry)
    matrix.assemble()
    return matrix


def shifted(t: float, u: Any, shift: float) -> PETSc.Mat:
    return diagonal(*[shift] * 6)


class Scaling:
    """A PC that is made for the state without tangents."""

    shift = 1.0

    def update(self, t: float, u: torch.Tensor, shift: float) -> None:
        assert u.shape == (2, 3)
        self.shift = shift

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        assert x.getLocalSize() == 6
        x.copy(y)
        y.scale(1 / self.shift)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self.apply(pc, x, y)


def twice(node: NeuralODE, u0: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return derivatives(lambda u: node(u, TIMES), u0, list(node.func.parameters()))


@pytest.mark.parametrize("preconditioner", ["block", Approximate(shifted), UserPC(Scaling())], ids=lambda p: type(p))
@pytest.mark.parametrize(
    "mass", at_night([None, torch.arange(1.0, 7.0).view(2, 3)], but=[None]), ids=["identity", "mass"]
)
def test_a_preconditioner_serves_second_derivatives(preconditioner: Any, mass: torch.Tensor | None) -> None:
    node = NeuralODE(Network(), method="cn", step_size=0.1, options=TIGHT, mass=mass)
    wanted = twice(node, random(2, 3))
    node.preconditioner = preconditioner
    assert distance(twice(node, random(2, 3)), wanted) <= 1e-9


def test_a_preconditioner_of_second_derivatives_is_destroyed_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    node = NeuralODE(Network(), method="cn", step_size=0.1, options=TIGHT, preconditioner=Approximate(shifted))
    twice(node, random(2, 3))
    del node
    gc.collect()
    assert not raised


def test_an_assembled_preconditioner_serves_second_derivatives(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (4, 5), channels=2)
    layer = Conv2d(partition, 2, 2, dtype=torch.float64)
    field = random(4, 5, 2)
    found = []
    for preconditioner, options in ((None, {}), ("assembled", {"pc_type": "ilu"})):
        node = NeuralODE(
            Saturated(layer),
            method="cn",
            step_size=0.1,
            partition=partition,
            preconditioner=preconditioner,
            options=TIGHT | options,
        )
        found.append(twice(node, field))
    assert distance(found[1], found[0]) <= 1e-9


class Saturated(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(u))


def test_a_mass_matrix_of_petsc_counts_in_second_derivatives() -> None:
    node = NeuralODE(Network(), method="cn", step_size=0.1, options=TIGHT, mass=torch.arange(1.0, 7.0).view(2, 3))
    wanted = twice(node, random(2, 3))
    node.mass = diagonal(1, 2, 3, 4, 5, 6)
    assert distance(twice(node, random(2, 3)), wanted) <= 1e-9


@pytest.mark.parametrize("options", [{}, {"ksp_type": "preonly", "pc_type": "lu"}, {"pc_type": "jacobi"}])
def test_a_linear_part_of_petsc_counts_in_second_derivatives(options: dict[str, Any]) -> None:
    rates = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
    plain = SplitFunction(implicit=lambda t, u: -rates * u, explicit=Network())
    wanted = twice(NeuralODE(plain, method="arkimex_3", step_size=0.1, options=TIGHT), random(2, 3))
    matrix = SplitFunction(implicit=diagonal(*-rates.view(-1).numpy()), explicit=Network())
    tight = {name: value for name, value in TIGHT.items() if name.startswith("snes")}
    node = NeuralODE(matrix, method="arkimex_3", step_size=0.1, options=tight | options)
    assert distance(twice(node, random(2, 3)), wanted) <= 1e-9


def test_hooks_on_parameters_run_once_a_backward_pass() -> None:
    network, start = Network(), random(2, 3).requires_grad_()
    calls: list[int] = []
    value = penalised(lambda u: odeint(network, u, TIMES, step_size=0.1), start, list(network.parameters()))
    network.inner.register_hook(lambda gradient: calls.append(1))
    value.backward()
    assert len(calls) == 1
