"""Attempts of steps with error control as one compiled function each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random

# Neither the generated code nor its compilation is under test here.
BACKEND = "aot_eager"
TIMES = [0.0, 1.0, 2.5]


@pytest.mark.parametrize(
    "method", ["dopri5", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("heun", "bosh3"))]
)
def test_the_steps_and_gradients_are_those_of_uncompiled_attempts(method: str, tmp_path: Path) -> None:
    network, u0 = Network(), 3 * random(2, 3)
    parameters = list(network.parameters())
    found = []
    for compile in (False, BACKEND):
        # The first step is far too long, so that attempts are rejected.
        node = NeuralODE(
            network, method=method, rtol=1e-4, atol=1e-6, step_size=2.5, compile=compile, trajectory=Trajectory("1MiB")
        )
        found.append(gradients(lambda u: node(u, TIMES), u0, parameters))  # noqa: B023
        solve = node.last_solve
        found.append((solve.forward_steps, solve.rejected_steps, solve.vjps))
        assert solve.rejected_steps > 0
        assert solve.recomputed_steps == 0
    assert distance(found[2], found[0]) <= 1e-13
    assert found[3] == found[1]
    for trajectory in (
        Trajectory(keep="solution"),
        Trajectory(ram_slots=1),
        Trajectory(keep="stages"),
        Trajectory(ram_slots=0, disk_slots=3, directory=tmp_path),
    ):
        node.trajectory = trajectory
        assert identical(gradients(lambda u: node(u, TIMES), u0, parameters), found[2]), trajectory


def test_gradients_with_respect_to_times_are_those_of_uncompiled_attempts() -> None:
    network, found = Network(), []
    for compile in (False, BACKEND):
        times = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
        node = NeuralODE(network, method="bosh3", rtol=1e-3, atol=1e-4, step_size=0.5, compile=compile)
        found.append(torch.autograd.grad(node(random(2, 3), times)[1:].square().sum(), times))
    assert distance(found[1], found[0]) <= 1e-12
