"""Modules that torch's fully_shard has spread over replicas: round the solve it works, inside func it is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from pnode_dist import ConfigurationError, NeuralODE, Trajectory, odeint
from tests import torch_releases
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.slow
TIMES = [0.0, 0.5, 1.0]
REFUSED = "apply fully_shard to the NeuralODE, or to the module that calls odeint, and to nothing inside func"


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Layers(nn.Module):
    """du/dt of two layers, which fully_shard can be applied to one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=number))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.outer(torch.tanh(self.inner(u))))


class Calling(nn.Module):
    """A module that calls odeint."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.func, self.method = Layers(), method

    def forward(self, u0: torch.Tensor, t: list[float]) -> torch.Tensor:
        return odeint(self.func, u0, t, method=self.method, step_size=0.25)


def node_of(method: str, keep: str = "auto") -> NeuralODE:
    return NeuralODE(Layers(), method=method, step_size=0.25, trajectory=Trajectory(ram="1MiB", keep=keep))


def outcome(model: nn.Module) -> list[torch.Tensor]:
    """The solution, and the gradients with respect to its start and all parameters."""
    start = random(4, 3).requires_grad_()
    found = model(start, TIMES)
    torch.sin(found).sum().backward()
    gradients = [start.grad, *(parameter.grad for parameter in model.parameters())]
    whole = (g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients if g is not None)
    return [found.detach(), *whole]


@torch_releases.fully_sharding_on_a_cpu
@pytest.mark.parametrize("method", ["rk4", "cn"])
@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
def test_a_sharded_node_has_the_gradients_of_the_node(method: str, keep: str) -> None:
    wanted, node = outcome(node_of(method, keep)), node_of(method, keep)
    fully_shard(node)
    found = outcome(node)
    assert len(found) == 6
    assert distance(found, wanted) < 1e-14
    node.zero_grad()
    assert distance(outcome(node), wanted) < 1e-14


@torch_releases.fully_sharding_on_a_cpu
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_a_sharded_module_that_calls_odeint_has_the_gradients_of_the_module(method: str) -> None:
    wanted, model = outcome(Calling(method)), Calling(method)
    fully_shard(model)
    assert distance(outcome(model), wanted) < 1e-14


@pytest.mark.parametrize("method", ["rk4", "cn"])
@pytest.mark.parametrize("inside", ["func", "func.inner"])
def test_sharding_inside_func_is_refused_with_what_to_do_instead(method: str, inside: str) -> None:
    node = node_of(method)
    fully_shard(node.get_submodule(inside))
    with pytest.raises(ConfigurationError, match=REFUSED):
        node(random(4, 3), TIMES)


@torch_releases.fully_sharding_on_a_cpu
def test_a_sharded_func_is_solved_with_where_no_gradient_is_asked_for() -> None:
    wanted, node = node_of("rk4"), node_of("rk4")
    fully_shard(node.func)
    with torch.no_grad():
        assert distance(node(random(4, 3), TIMES), wanted(random(4, 3), TIMES)) < 1e-14
