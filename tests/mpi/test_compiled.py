"""Compiled steps of an f that communicates, on partitions of several ranks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.exchange import global_sum
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.test_odeint import SHAPE, Flow, here
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi
TIMES = [0.0, 0.7, 0.9]


class Coupled(nn.Module):
    """A halo, and a sum over all ranks that does not depend on it."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        self.flow, self.partition = Flow(partition), partition

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = global_sum(u.sin().sum(), self.partition.comm) / 50.0
        return self.flow(t, u) - mean * u


@pytest.mark.parametrize(
    ("keep", "settings"),
    [
        ("graph", {}),
        pytest.param("stages", {}, marks=pytest.mark.nightly),
        pytest.param("solution", {}, marks=pytest.mark.nightly),
        pytest.param("solution", {"method": "bosh3", "rtol": 1e-3, "atol": 1e-4}, marks=pytest.mark.nightly),
    ],
    ids=["graph", "stages", "solution", "error control"],
)
def test_compiled_steps_with_exchanges_have_the_gradient_of_uncompiled_ones(
    mesh: Mesh, keep: str, settings: dict[str, Any]
) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("periodic", "zero"))
    func = Coupled(partition)
    local = here(random(*SHAPE, 2), partition).clone().requires_grad_()
    budget = Trajectory(ram="1GiB", keep=keep, ram_slots=None if keep == "graph" else 1)
    found = []
    for compile in (False, "aot_eager"):
        node = NeuralODE(func, step_size=0.1, partition=partition, trajectory=budget, compile=compile, **settings)
        with warnings.catch_warnings():
            if TRACES_OBJECTS:
                warnings.filterwarnings("error", message="compile: steps are not compiled")
            states = node(local, TIMES)
        found.append((states.detach(), *torch.autograd.grad(states.sin().sum(), [local, *func.parameters()])))
    assert distance(found[1], found[0]) <= 1e-13


def test_all_ranks_run_as_it_is_what_one_rank_cannot_compile(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("periodic", "zero"))
    flow, last = Flow(partition), mesh.state_comm.rank == mesh.state_comm.size - 1

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            factor = 1.0 + float(np.float64(u.detach().sum().item()) * 0.0) if last else 1.0
            return factor * self.flow(t, u)

    local = here(random(*SHAPE, 2), partition).clone().requires_grad_()
    found = []
    for compile in (False, "aot_eager"):
        node = NeuralODE(Untraceable(), step_size=0.1, partition=partition, compile=compile)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            states = node(local, TIMES)
        told = [str(warning.message) for warning in caught if "compile: steps" in str(warning.message)]
        assert len(told) == (bool(compile) and TRACES_OBJECTS and mesh.state_comm.rank == 0)
        found.append(torch.autograd.grad(states.square().sum(), [local, *flow.parameters()]))
    assert distance(found[1], found[0]) <= 1e-13
