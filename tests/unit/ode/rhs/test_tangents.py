"""Tangents of a solve against difference quotients, against its adjoint, and to second order."""

import pytest
import torch

from pnode_dist import ConfigurationError, NeuralODE, SplitFunction, Trajectory
from pnode_dist.ode.methods import METHODS
from tests.oracles.differences import directional_derivative
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.3, 0.5]
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}


def tight(method: str) -> dict[str, float]:
    return TIGHT if METHODS[method].implicit else {}


def right_hand_side(method: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if method.startswith("arkimex"):
        return SplitFunction(implicit=Network(), explicit=Network())
    return Network()


def directions(node: NeuralODE, u0: torch.Tensor) -> tuple[torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
    return torch.randn_like(u0), {value: torch.randn_like(value) for value in node.func.parameters()}


@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn", "arkimex_3", "dirk_s212"])
def test_the_tangent_is_the_derivative_of_the_states(method: str) -> None:
    node, u0 = NeuralODE(right_hand_side(method), method=method, step_size=0.1, options=tight(method)), random(2, 3)
    along, parameters = directions(node, u0)
    states, tangents = node.jvp(u0, TIMES, along, parameters)
    weights = torch.randn_like(states)
    values = list(node.func.parameters())

    def weighted(state: torch.Tensor, *moved: torch.Tensor) -> torch.Tensor:
        before = [value.detach().clone() for value in values]
        for value, new in zip(values, moved, strict=True):
            value.data.copy_(new)
        result = (node(state, TIMES) * weights).sum()
        for value, old in zip(values, before, strict=True):
            value.data.copy_(old)
        return result

    wanted = directional_derivative(weighted, [u0, *values], [along, *parameters.values()])
    assert (tangents * weights).sum().item() == pytest.approx(wanted, rel=1e-8)
    assert torch.equal(states, node(u0, TIMES)) or torch.allclose(states, node(u0, TIMES), rtol=1e-12)


@pytest.mark.parametrize("method", ["rk4", "cn", "arkimex_3"])
def test_the_tangent_is_the_transpose_of_the_adjoint(method: str) -> None:
    node = NeuralODE(right_hand_side(method), method=method, step_size=0.1, options=tight(method))
    u0 = random(2, 3).requires_grad_()
    along, parameters = directions(node, u0)
    _, tangents = node.jvp(u0, TIMES, along, parameters)
    weights = torch.randn_like(tangents)
    values = list(node.func.parameters())
    gradients = torch.autograd.grad((node(u0, TIMES) * weights).sum(), [u0, *values])
    pulled = sum((g * d).sum() for g, d in zip(gradients, [along, *parameters.values()], strict=True))
    assert (tangents * weights).sum().item() == pytest.approx(pulled.item(), rel=1e-11)


def test_with_error_control_the_steps_are_those_of_the_solve_without_a_tangent() -> None:
    node, u0 = NeuralODE(Network(), rtol=1e-5, atol=1e-7), random(2, 3)
    alone = node(u0, TIMES)
    steps = node.last_solve.forward_steps
    states, _ = node.jvp(u0, TIMES, torch.randn_like(u0))
    assert node.last_solve.forward_steps == steps
    assert torch.allclose(states, alone, rtol=1e-14)


def test_the_gradient_of_a_tangent_is_a_hessian_vector_product() -> None:
    node, u0 = NeuralODE(Network(), method="cn", step_size=0.1, options=TIGHT), random(2, 3).requires_grad_()
    along = torch.randn(2, 3, dtype=torch.float64)

    def gradient(state: torch.Tensor) -> torch.Tensor:
        state = state.detach().requires_grad_()
        return torch.autograd.grad(node(state, TIMES)[-1].pow(3).sum(), state)[0]

    states, tangents = node.jvp(u0, TIMES, along)
    slope = (3 * states[-1].square() * tangents[-1]).sum()
    (product,) = torch.autograd.grad(slope, u0)
    step = 1e-4
    wanted = (gradient(u0 + step * along) - gradient(u0 - step * along)) / (2 * step)
    assert torch.allclose(product, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_the_gradient_of_a_tangent_of_euler_steps_is_that_through_the_plain_steps(keep: str) -> None:
    network, u0, along = Network(), random(2, 3).requires_grad_(), random(2, 3, seed=2)
    parameters = list(network.parameters())
    directions = {value: random(*value.shape, seed=3) for value in parameters}
    node = NeuralODE(network, method="euler", step_size=0.1, trajectory=Trajectory(ram="1MiB", keep=keep))
    _, tangents = node.jvp(u0, TIMES, along, directions)
    found = torch.autograd.grad(torch.sin(tangents).sum(), [u0, *parameters])

    def plain(u: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(network.named_parameters()), values, strict=True))

        def func(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            rate: torch.Tensor = torch.func.functional_call(network, named, (t, x))
            return rate

        states: torch.Tensor = odeint_plain(func, u, TIMES, TABLEAUX["1fe"], 0.1)
        return states

    wanted = torch.func.jvp(plain, (u0, *parameters), (along, *directions.values()))[1]
    assert distance(found, torch.autograd.grad(torch.sin(wanted).sum(), [u0, *parameters])) <= 1e-13


def test_a_tangent_of_another_shape_is_refused() -> None:
    node, u0 = NeuralODE(Network()), random(2, 3)
    with pytest.raises(ConfigurationError, match="u0_tangent"):
        node.jvp(u0, TIMES, torch.zeros(2, 2))
    with pytest.raises(ConfigurationError, match="parameter_tangents"):
        node.jvp(u0, TIMES, torch.zeros_like(u0), {next(node.parameters()): torch.zeros(1)})
