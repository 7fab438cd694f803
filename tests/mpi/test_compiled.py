"""Compiled code around exchanges that stay as they are."""

import pytest
import torch

from pnode_dist import GridPartition, Mesh, NeuralODE
from tests.mpi.test_odeint import SHAPE, TIMES, Flow, here
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi


def test_a_compiled_field_has_the_gradient_of_one_that_is_not(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("periodic", "zero"))
    flow = Flow(partition)
    local = here(random(*SHAPE, 2), partition).clone().requires_grad_()
    found = []
    for compile in (False, "aot_eager"):
        node = NeuralODE(flow, step_size=0.1, partition=partition, compile=compile)
        found.append(torch.autograd.grad(node(local, TIMES)[-1].square().sum(), [local, *flow.parameters()]))
    assert distance(found[1], found[0]) <= 1e-13
