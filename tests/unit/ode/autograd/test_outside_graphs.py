"""torch.compile round models that solve: the solve is left out of the compiled graph, and gives the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, odeint
from tests.oracles.right_hand_sides import Network, random

EVERY_METHOD = pytest.mark.parametrize("method", ["rk4", "cn"])


class Model(nn.Module):
    """A solve between two linear layers."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
        self.node = NeuralODE(Network(), method=method, step_size=0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.node(torch.sin(self.before(x)), [0.0, 1.0])
        return torch.as_tensor(self.after(torch.tanh(states[-1]))).square().sum()


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outcome(function: Callable[[torch.Tensor], torch.Tensor], model: nn.Module) -> list[torch.Tensor]:
    """The value, and the gradients with respect to the input and all parameters."""
    x = random(4, 3).requires_grad_()
    value = function(x)
    return [value.detach(), *torch.autograd.grad(value, [x, *model.parameters()])]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@EVERY_METHOD
def test_a_compiled_model_has_the_values_and_gradients_of_the_model(method: str) -> None:
    model = Model(method)
    wanted = outcome(model, model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        assert equal(outcome(compiled, model), wanted)


@EVERY_METHOD
def test_what_is_round_the_solve_is_compiled(method: str) -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    model = Model(method)
    outcome(torch.compile(model, backend=backend), model)
    assert len(graphs) == 2
    assert any("sin" in target for target in graphs[0])
    assert any("tanh" in target for target in graphs[1])


@EVERY_METHOD
def test_a_compiled_node_and_a_compiled_call_of_odeint_give_the_same(method: str) -> None:
    node = Model(method).node

    def last(x: torch.Tensor) -> torch.Tensor:
        return odeint(node.func, torch.sin(x), [0.0, 1.0], method=method, step_size=0.25)[-1].sum()

    wanted = outcome(lambda x: node(torch.sin(x), [0.0, 1.0])[-1].sum(), node)
    compiled = torch.compile(node, backend="eager")
    assert equal(outcome(lambda x: compiled(torch.sin(x), [0.0, 1.0])[-1].sum(), node), wanted)
    assert equal(outcome(torch.compile(last, backend="eager"), node), wanted)


def test_a_compiled_model_is_evaluated_without_gradients_too() -> None:
    model, x = Model("cn"), random(4, 3)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_one_graph_for_all_is_refused_with_what_to_do_instead() -> None:
    model = Model("rk4")
    told = r"leave fullgraph=True away, and give NeuralODE\(compile=True\)"
    if "reason" not in inspect.signature(torch.compiler.disable).parameters:
        told = r"call torch._dynamo.disable\(\) wrapped function <function NeuralODE.forward "
    with pytest.raises(Exception, match=told):
        torch.compile(model, backend="eager", fullgraph=True)(random(4, 3))
