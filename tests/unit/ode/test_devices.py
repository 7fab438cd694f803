"""f on another device than PETSc's vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint
from tests.oracles.other_device import Hidden, other_device, transfers
from tests.oracles.right_hand_sides import Network, random

TIMES = [0.0, 0.5, 1.0]


def solved(device: torch.device, **settings: Any) -> tuple[torch.Tensor, ...]:
    """The states and the gradients by the initial state and all parameters, with everything on `device`."""
    network = Network()
    for name, value in list(network.named_parameters()):
        setattr(network, name, torch.nn.Parameter(value.detach().to(device)))
    u0 = random(2, 3).to(device).requires_grad_()
    node = NeuralODE(network, step_size=0.25, trajectory=Trajectory(ram="1MiB"), **settings)
    states = node(u0, TIMES)
    held = [u0, *network.parameters()]
    found = torch.autograd.grad(states.square().sum(), held)
    assert all(value.device == device for value in (states, *found))
    return states.detach(), *found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compute_dtype": torch.float32},
        {"method": "dopri5", "rtol": 1e-4},
        {"method": "cn"},
        {"method": "cn", "preconditioner": "block"},
    ],
    ids=["explicit", "float32", "adaptive", "implicit", "preconditioned"],
)
def test_values_and_gradients_are_there_and_are_those_of_the_cpu(settings: dict[str, Any]) -> None:
    there = solved(other_device(), **settings)
    assert all(isinstance(value, Hidden) for value in there)
    here = solved(torch.device("cpu"), **settings)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(there, here, strict=True))


def test_each_stage_takes_one_copy_there_and_one_back() -> None:
    device = other_device()
    u0 = random(2, 3).to(device)

    def copies(steps: int) -> dict[str, int]:
        before = dict(transfers)
        odeint(lambda t, u: -u, u0, [0.0, 1.0], step_size=1.0 / steps)
        return {way: transfers[way] - before[way] for way in transfers}

    few, many = copies(2), copies(12)
    assert {way: (many[way] - few[way]) / (10 * 4) for way in few} == {"there": 1.0, "back": 1.0}


def test_a_tuple_on_two_devices_is_refused() -> None:
    with pytest.raises(TypeError, match="u0 must be on one device"):
        odeint(lambda t, u: u, (random(2), random(2).to(other_device())), TIMES)
