"""f in another floating type than state and parameters: `compute_dtype`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.errors import ConfigurationError
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.5, 1.5]
STEP_SIZE = 0.25
LOW = [torch.float32, torch.bfloat16]


def lowered(module: nn.Module, dtype: torch.dtype) -> Any:
    """What is to be computed, in plain torch: all is converted at every evaluation, and the result converted back."""

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        low = {name: value.to(dtype) for name, value in module.named_parameters()}
        result: torch.Tensor = torch.func.functional_call(module, low, (t.to(dtype), u.to(dtype)))
        return result.to(u.dtype)

    return func


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_values_and_gradients_are_those_of_plain_torch_with_converted_evaluations(
    dtype: torch.dtype, keep: Any
) -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    settings: dict[str, Any] = {"trajectory": Trajectory(ram="1MiB", keep=keep), "compute_dtype": dtype}
    found = gradients(lambda u: odeint(network, u, TIMES, method="euler", step_size=0.25, **settings), u0, parameters)
    # Both form the same states to the last bit: any other difference could be rounded to one of the lower type's.
    func = lowered(network, dtype)
    wanted = gradients(lambda u: odeint_plain(func, u, TIMES, TABLEAUX["1fe"], 0.25), u0, parameters)
    assert torch.equal(found[0], wanted[0])
    assert distance(found, wanted) <= 1e-14


def test_all_that_f_is_given_has_the_type_it_computes_in() -> None:
    seen = set()

    class Watching(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            seen.update({t.dtype, u.dtype, scale.dtype, *(value.dtype for value in self.parameters())})
            return scale * super().forward(t, u)

    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    network = Watching()
    node = NeuralODE(network, step_size=STEP_SIZE, compute_dtype=torch.float32)
    states = node(random(2, 3), TIMES, scale)
    assert all(value.dtype is torch.float64 for value in network.parameters())
    states.square().sum().backward()
    assert seen == {torch.float32}
    assert states.dtype is torch.float64
    held = [*network.parameters(), scale]
    assert all(value.grad is not None and value.grad.dtype is torch.float64 for value in held)


def test_a_module_that_a_function_closes_over_is_converted_too() -> None:
    network, u0 = Network(), random(2, 3)
    settings: dict[str, Any] = {"step_size": STEP_SIZE, "compute_dtype": torch.float32}
    wanted = gradients(lambda u: odeint(network, u, TIMES, **settings), u0, list(network.parameters()))
    found = gradients(
        lambda u: odeint(lambda t, v: network(t, v), u, TIMES, **settings), u0, list(network.parameters())
    )
    assert distance(found, wanted) == 0.0


def test_a_float32_state_may_be_computed_on_in_float64() -> None:
    network, u0 = Network(), random(2, 3, dtype=torch.float32)
    found = odeint(network, u0, TIMES, step_size=STEP_SIZE, compute_dtype=torch.float64)
    wanted = odeint(network, u0.double(), TIMES, step_size=STEP_SIZE)
    assert torch.equal(found, wanted.float())


def test_a_parameter_that_is_used_twice_is_converted_to_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.outer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.outer.weight = self.inner.weight

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.outer(torch.tanh(self.inner(u)))
            return result

    module, u0 = Tied(), random(2, 3)
    weight = module.inner.weight
    found = gradients(
        lambda u: odeint(module, u, TIMES, step_size=STEP_SIZE, compute_dtype=torch.float32), u0, [weight]
    )
    wanted = gradients(lambda u: odeint(module, u, TIMES, step_size=STEP_SIZE), u0, [weight])
    assert module.inner.weight is module.outer.weight is weight
    assert 0 < distance(found, wanted) <= 1e-5


def test_a_module_has_its_parameters_back_after_an_error() -> None:
    class Failing(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("f gave up")

    network = Failing()
    before = dict(network.named_parameters())
    with pytest.raises(ArithmeticError, match="f gave up"):
        odeint(network, random(2, 3), TIMES, compute_dtype=torch.float32)
    assert all(value is before[name] for name, value in network.named_parameters())


def test_what_f_writes_into_its_buffers_stays() -> None:
    class Counting(nn.Module):
        count: torch.Tensor
        scale: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))
            self.register_buffer("scale", torch.tensor(-0.1, dtype=torch.float64))

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return self.scale * u

    module = Counting()
    odeint(module, random(2, 3), [0.0, 1.0], step_size=0.5, compute_dtype=torch.float32)
    assert module.count.item() == 8
    assert module.count.dtype is module.scale.dtype is torch.float64
    assert module.scale.item() == -0.1


def test_a_second_solve_before_the_first_backward_pass_leaves_its_gradient_alone() -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    node = NeuralODE(network, step_size=STEP_SIZE, compute_dtype=torch.float32)
    wanted = torch.autograd.grad(node(u0, TIMES).square().sum(), parameters)
    first = node(u0, TIMES).square().sum()
    node(2 * u0, TIMES)
    assert distance(torch.autograd.grad(first, parameters), wanted) == 0.0


def test_tangents_are_those_in_double_precision_up_to_rounding() -> None:
    network, u0, direction = Network(), random(2, 3), random(2, 3, seed=2)
    along = {network.inner: random(*network.inner.shape, seed=3)}
    values = {}
    for dtype in (torch.float32, torch.float64):
        node = NeuralODE(network, step_size=STEP_SIZE, compute_dtype=dtype)
        states, tangents = node.jvp(u0, TIMES, direction, along)
        values[dtype] = (states.detach(), tangents.detach(), *torch.autograd.grad(tangents.sum(), [network.inner]))
    assert 0 < distance(values[torch.float32], values[torch.float64]) <= 1e-5


@pytest.mark.parametrize("method", ["cn", "beuler", "arkimex_3"])
def test_implicit_gradients_are_those_in_double_precision_up_to_rounding(method: str) -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    split = SplitFunction(implicit=lambda t, u: -3.0 * u, explicit=network)
    found = {
        dtype: gradients(
            lambda u, dtype=dtype: odeint(  # type: ignore[misc]
                split, u, TIMES, method=method, step_size=STEP_SIZE, compute_dtype=dtype
            ),
            u0,
            parameters,
        )
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    }
    assert 0 < distance(found[torch.float32], found[torch.float64]) <= 2e-5
    assert 0 < distance(found[torch.bfloat16], found[torch.float64]) <= 0.02


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "float32"], ids=str)
def test_a_type_that_f_cannot_compute_in_is_refused(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"compute_dtype = .*: must be a real floating type"):
        odeint(Network(), random(2, 3), TIMES, compute_dtype=dtype)


def test_gradients_of_float32_parameters_are_summed_in_float64_in_a_float64_solve() -> None:
    rate = torch.ones(1, requires_grad=True)
    u0 = torch.zeros(1, dtype=torch.float64)
    odeint(lambda t, u: rate.double() * torch.ones_like(u), u0, [0.0, 1.0], method="euler", step_size=1e-4)[
        -1
    ].backward()
    assert rate.grad is not None
    assert abs(rate.grad.item() - 1.0) <= 2**-23
