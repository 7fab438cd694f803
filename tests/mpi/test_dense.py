"""Dense solutions of partitioned states, against plain torch with the whole state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, GridPartition, Mesh, solve_dense
from pnode_dist.nn import Conv2d
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

SHAPE, BOUNDARY = (7, 9), ("replicate", "periodic")
QUERIES = [0.73, 0.0, 0.31, 1.0]


class Flow(nn.Module):
    """A convolution and a nonlinearity, on a partitioned grid or, as `whole`, on all of it."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = Conv2d(partition, 2, 2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(u)) * torch.cos(5 * t)

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(convolved(u[None], BOUNDARY, self.conv.weight, self.conv.bias)[0]) * torch.cos(5 * t)


def test_states_and_gradients_are_those_of_the_whole_state(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    f, whole = Flow(partition), random(*SHAPE, 2)
    start, alone = partition.scatter(whole).requires_grad_(), whole.clone().requires_grad_()
    solution = solve_dense(f, start, [0.0, 1.0], step_size=0.25, partition=partition)
    found = solution(QUERIES)
    wanted = torch.stack(
        [
            odeint_plain(f.whole, alone, [end for end in (0.0, 0.25, 0.5, 0.75) if end < time] + [time], TABLEAUX["4"])[
                -1
            ]
            for time in QUERIES
        ]
    )
    (y0, y1), (x0, x1) = partition.owned
    assert distance(found.detach(), wanted.detach()[:, y0:y1, x0:x1]) < 1e-12
    own = torch.autograd.grad(found.sin().sum(), [start, *f.parameters()])
    expected = torch.autograd.grad(wanted.sin().sum(), [alone, *f.parameters()])
    assert distance(own[0], expected[0][y0:y1, x0:x1]) < 1e-12
    assert distance([mesh.sum(part) for part in own[1:]], expected[1:]) < 1e-12


def test_hermites_cubic_evaluates_f_on_all_ranks(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    f, whole = Flow(partition), random(*SHAPE, 2)
    settings = {"step_size": 0.02, "partition": partition}
    with torch.no_grad():
        cubic = solve_dense(f, partition.scatter(whole), [0.0, 1.0], interpolant="hermite", **settings)
        step = solve_dense(f, partition.scatter(whole), [0.0, 1.0], **settings)
        assert 0 < mesh.sum((cubic(QUERIES) - step(QUERIES)).abs().max()) < 1e-5


def test_a_time_outside_on_one_rank_is_an_error_on_all(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    solution = solve_dense(Flow(partition), partition.scatter(random(*SHAPE, 2)), [0.0, 1.0], partition=partition)
    with pytest.raises(ConfigurationError, match=r"must be between 0.* and 1"):
        solution(2.0 if mesh.rank == mesh.size - 1 else 0.5)
