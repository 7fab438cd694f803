"""Recordings of methods with a stage without weight leave out what nothing depends on, and only that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

POINT, CHARGE = random(4, 3), random(4, 3, seed=2)


class WithCharge(nn.Module):
    """A point, and a charge on which neither rate depends unless `feeds_back` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.cost = Network(), Network(seed=1)
        self.feeds_back = 0.0

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        point, charge = u
        rate = self.rate(t, point)
        return (rate + self.feeds_back * charge if self.feeds_back else rate), self.cost(t, point) ** 2


def solved(node: NeuralODE) -> tuple[torch.Tensor, ...]:
    start = POINT.clone().requires_grad_()
    point, charge = node((start, CHARGE), [0.0, 1.0])
    loss = torch.sin(point).sum() + charge.square().sum()
    return torch.autograd.grad(loss, [start, *node.parameters()])


def plain(func: WithCharge, method: str) -> tuple[torch.Tensor, ...]:
    """By back-propagation through steps of both parts as one tensor."""
    start = POINT.clone().requires_grad_()

    def joined(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack(func(t, (u[0], u[1])))

    point, charge = odeint_plain(joined, torch.stack([start, CHARGE]), [0.0, 1.0], TABLEAUX[method], 0.25)[-1]
    loss = torch.sin(point).sum() + charge.square().sum()
    return torch.autograd.grad(loss, [start, *func.parameters()])


def bytes_of_cost(func: WithCharge) -> int:
    """What one evaluation of the cost saves for its gradient, besides the point and the parameters."""
    saved: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (POINT, *func.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _cost = func.cost(torch.zeros(()), POINT) ** 2
    return sum(saved.values())


SOLVES: dict[str, tuple[str, str, Trajectory]] = {
    "midpoint": ("midpoint", "2b", Trajectory(ram="1MiB", keep="graph")),
    "dopri5": ("dopri5", "5dp", Trajectory(ram="1MiB", keep="graph")),
    "dopri5, two checkpoints": ("dopri5", "5dp", Trajectory(ram_slots=2)),
}


@pytest.mark.parametrize(("method", "name", "trajectory"), SOLVES.values(), ids=SOLVES)
def test_gradients_are_right_whether_a_rate_depends_on_the_charge_or_not(method, name, trajectory):
    func = WithCharge()
    node = NeuralODE(func, method=method, step_size=0.25, trajectory=trajectory, last_only=True)
    for feeds_back in (0.0, 0.5, 0.0):
        func.feeds_back = feeds_back
        assert distance(solved(node), plain(func, name)) <= 1e-13


def test_a_recording_is_smaller_where_nothing_depends_on_the_charge() -> None:
    func = WithCharge()
    sizes = []
    for feeds_back in (0.5, 0.0):
        func.feeds_back = feeds_back
        trajectory = Trajectory(ram="1MiB", keep="graph")
        node = NeuralODE(func, method="midpoint", step_size=0.25, trajectory=trajectory, last_only=True)
        solved(node)
        sizes.append(node.last_solve.graph_bytes)
    assert sizes[0] - sizes[1] >= bytes_of_cost(func) > 0


def test_f_may_hold_on_to_its_state() -> None:
    func = WithCharge()
    held: list[torch.Tensor] = []
    func.register_forward_hook(lambda module, given, value: held.extend(given[1]))
    node = NeuralODE(func, method="midpoint", step_size=0.25, trajectory=Trajectory(ram="1MiB", keep="graph"))
    node.last_only = True
    found = solved(node)
    assert held
    assert distance(found, plain(WithCharge(), "2b")) <= 1e-13
