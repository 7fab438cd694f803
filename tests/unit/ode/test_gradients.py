"""Values and gradients of every method against plain torch and against difference quotients."""

import pytest
import torch
import torchdiffeq

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.ode.methods import METHODS, resolve
from tests.oracles.differences import directional_derivative
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

NAMES = sorted({*(name for name, method in METHODS.items() if method.family == "rk"), *TABLEAUX})
TIMES = [0.0, 0.4, 0.7, 1.5]
STEP_SIZE = 0.25


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def u0() -> torch.Tensor:
    return random(2, 3)


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_plain_torch(
    name: str, times: list[float], network: Network, u0: torch.Tensor
) -> None:
    table = TABLEAUX[resolve(name).petsc_name]
    parameters = list(network.parameters())
    found = gradients(lambda u: odeint(network, u, times, method=name, step_size=STEP_SIZE), u0, parameters)
    wanted = gradients(lambda u: odeint_plain(network, u, times, table, STEP_SIZE), u0, parameters)
    assert distance(found[0], wanted[0]) <= 1e-13
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("petsc_name", TABLEAUX)
def test_gradients_are_those_of_difference_quotients(petsc_name: str, network: Network, u0: torch.Tensor) -> None:
    names, parameters = zip(*network.named_parameters(), strict=True)

    def loss(start: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = torch.func.functional_call(network, dict(zip(names, values, strict=True)), (t, u))
            return result

        return torch.sin(odeint(func, start, TIMES, method=petsc_name, step_size=STEP_SIZE, params=values)).sum()

    point = [u0.clone().requires_grad_(), *parameters]
    direction = [random(*value.shape, seed=7 + k) for k, value in enumerate(point)]
    found = torch.autograd.grad(loss(*point), point)
    along = float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))
    wanted = directional_derivative(loss, point, direction, step=3e-4)
    assert along == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("petsc_name", TABLEAUX)
def test_the_order_of_convergence_is_seen_through_petsc(petsc_name: str) -> None:
    table = TABLEAUX[petsc_name]

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        prey, predator = u.unbind()
        return torch.stack([prey * (1.2 - predator) + 0.1 * torch.sin(3 * t), predator * (prey - 0.8)])

    start = torch.tensor([1.0, 0.5], dtype=torch.float64)
    converged = odeint(field, start, [0.0, 2.0], method="7vr", step_size=0.01)[-1]
    steps = {1: 256, 2: 64, 3: 32, 4: 16, 5: 8, 6: 8, 7: 8, 8: 6}[table.order]
    coarse, fine = (
        float((odeint(field, start, [0.0, 2.0], method=petsc_name, step_size=2.0 / n)[-1] - converged).norm())
        for n in (steps, 2 * steps)
    )
    assert fine * 2 ** (table.order - 0.1) < coarse


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [1, 2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "8vr"])
def test_a_loss_may_use_any_of_the_output_times(
    method: str, chosen: list[int], network: Network, u0: torch.Tensor
) -> None:
    weight = torch.zeros(4, 2, 3, dtype=torch.float64)
    weight[chosen] = random(len(chosen), 2, 3, seed=5)
    table, parameters = TABLEAUX[resolve(method).petsc_name], list(network.parameters())
    found = gradients(lambda u: odeint(network, u, TIMES, method=method, step_size=0.3), u0, parameters, weight)
    wanted = gradients(lambda u: odeint_plain(network, u, TIMES, table, 0.3), u0, parameters, weight)
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("petsc_name", TABLEAUX)
def test_func_is_evaluated_no_more_often_than_petsc_would(petsc_name: str, u0: torch.Tensor) -> None:
    table, steps, calls = TABLEAUX[petsc_name], 6, 0

    def counting(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return -u * torch.cos(t)

    node = NeuralODE(counting, method=petsc_name, step_size=0.5)
    with torch.no_grad():
        node(u0, [0.0, 3.0])
    stages = len(table.weights)
    most = (stages - 1) * steps + 1 if table.first_same_as_last else stages * steps
    assert table.contributing_stages * steps <= calls <= most
    assert node.last_solve.function_evaluations == calls
    assert (node.last_solve.forward_steps, node.last_solve.recomputed_steps, node.last_solve.vjps) == (steps, 0, 0)


@pytest.mark.parametrize("petsc_name", TABLEAUX)
def test_the_adjoint_takes_one_vector_jacobian_product_a_stage(petsc_name: str, u0: torch.Tensor) -> None:
    table, steps = TABLEAUX[petsc_name], 4
    for keep, again in (("solution", steps - 1), ("graph", 0)):
        node = NeuralODE(Network(), method=petsc_name, step_size=0.5, trajectory=Trajectory(keep=keep))
        node(u0, [0.0, 2.0])[-1].sum().backward()
        solve = node.last_solve
        assert table.contributing_stages * steps <= solve.vjps <= len(table.weights) * steps
        assert (solve.forward_steps, solve.recomputed_steps, solve.adjoint_steps) == (steps, again, steps)
        stages = table.contributing_stages
        assert stages * (steps + again) <= solve.function_evaluations <= len(table.weights) * (steps + again)


def test_dopri5_agrees_with_torchdiffeq_s_adaptive_solution(network: Network, u0: torch.Tensor) -> None:
    parameters, times = list(network.parameters()), torch.tensor(TIMES, dtype=torch.float64)
    found = gradients(lambda u: odeint(network, u, times, method="dopri5", step_size=0.02), u0, parameters)
    wanted = gradients(
        lambda u: torchdiffeq.odeint(network, u, times, method="dopri5", rtol=1e-10, atol=1e-12), u0, parameters
    )
    assert all(distance(f, w) <= 1e-6 for f, w in zip(found, wanted, strict=True))


def test_torch_s_own_gradcheck_passes(u0: torch.Tensor) -> None:
    weight = random(3, 3, seed=4).requires_grad_()

    def solve(start: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return odeint(lambda t, u: torch.tanh(u @ matrix) - t * u, start, [0.0, 0.3, 0.5], method="bosh3")

    assert torch.autograd.gradcheck(solve, (u0[0].clone().requires_grad_(), weight))
