"""Known jumps of f at several ranks: the solve of the whole state from jump to jump, and one list of jumps for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, DisagreementError, GridPartition, Mesh, NeuralODE, Trajectory, odeint
from pnode_dist.nn import Conv2d
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES, JUMPS = [0.0, 0.4, 1.0], [0.25, 0.4]
SHAPE, BOUNDARY = (7, 9), ("replicate", "periodic")


class Forced(nn.Module):
    """A convolution with another factor after each jump, on a partitioned grid or, as `whole`, on all of it."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = Conv2d(partition, 2, 2, dtype=torch.float64)
        self.factors = nn.Parameter(torch.tensor([1.0, -20.0, 3.0], dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(u)) * self.factors[sum(bool(t >= jump) for jump in JUMPS)]

    def whole(self, piece: int) -> Any:
        def smooth(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.tanh(convolved(u[None], BOUNDARY, self.conv.weight, self.conv.bias)[0]) * self.factors[piece]

        return smooth


@pytest.mark.parametrize(
    "settings",
    [
        {"step_size": 0.1},
        {"step_size": 0.1, "trajectory": Trajectory(ram_slots=2, keep="solution", schedule="revolve")},
        {"rtol": 1e-10, "atol": 1e-12},
    ],
    ids=["graphs", "two checkpoints", "error control"],
)
def test_states_and_gradients_are_those_of_the_whole_state(settings: dict[str, Any], mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    f, whole = Forced(partition), random(*SHAPE, 2)
    parameters = list(f.parameters())
    start, alone = partition.scatter(whole).requires_grad_(), whole.clone().requires_grad_()
    found = NeuralODE(f, partition=partition, jumps=JUMPS, **settings)(start, TIMES)[1:]
    controlled, state, wanted = "rtol" in settings, alone, []
    for piece, (begin, end) in enumerate([(0.0, 0.25), (0.25, 0.4), (0.4, 1.0)]):
        table, step = (TABLEAUX["8dp"], 0.02) if controlled else (TABLEAUX["4"], 0.1)
        state = odeint_plain(f.whole(piece), state, [begin, end], table, step)[-1]
        wanted.append(state)
    expected = torch.stack(wanted[1:])
    tolerance = 1e-8 if controlled else 1e-12
    (y0, y1), (x0, x1) = partition.owned
    assert distance(found.detach(), expected.detach()[:, y0:y1, x0:x1]) < tolerance
    gradients = torch.autograd.grad(expected.square().sum(), [alone, *parameters])
    own = torch.autograd.grad(found.square().sum(), [start, *parameters])
    assert distance(own[0], gradients[0][y0:y1, x0:x1]) < tolerance
    assert distance([mesh.sum(value) for value in own[1:]], gradients[1:]) < tolerance


def test_other_jumps_on_one_rank_are_an_error_on_all(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    u0 = partition.scatter(random(*SHAPE, 2))
    if mesh.size == 1:
        with pytest.raises(ConfigurationError, match="jumps = 'x'"):
            odeint(Forced(partition), u0, TIMES, step_size=0.1, partition=partition, jumps="x")
        return
    with pytest.raises(DisagreementError, match="the ranks differ in length of jumps: rank 0: 1"):
        odeint(Forced(partition), u0, TIMES, step_size=0.1, partition=partition, jumps=JUMPS[: 1 + bool(mesh.rank)])
