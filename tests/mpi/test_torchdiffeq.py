"""torchdiffeq's `odeint_adjoint` on a partitioned state: the steps, states and gradients of the whole state."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import BatchPartition, ConfigurationError, DisagreementError, Mesh
from pnode_dist.exchange import global_sum
from pnode_dist.torchdiffeq import odeint_adjoint
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi
TIMES = torch.tensor([0.0, 0.6, 2.0], dtype=torch.float64)


class Coupled(nn.Module):
    """Samples coupled by their mean. It records the steps that are accepted."""

    def __init__(self, samples: int, comm: MPI.Comm) -> None:
        super().__init__()
        self.samples, self.comm = samples, comm
        self.matrix = nn.Parameter(0.9 * random(3, 3))
        self.steps: list[tuple[float, float]] = []

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.sum(0), self.comm) / self.samples
        return 3 * torch.tanh(u @ self.matrix) - torch.cos(5 * t) * u * torch.tanh(mean)

    def callback_step(self, t: torch.Tensor, u: torch.Tensor, h: torch.Tensor) -> None:
        self.steps.append((t.item(), h.item()))


@pytest.mark.parametrize(
    ("method", "options"),
    [("dopri5", {"jump_t": [1.0], "max_step": 0.2}), ("rk4", {"step_size": 0.07, "interp": "cubic"})],
)
def test_states_steps_and_gradients_are_those_of_the_whole_state(
    method: str, options: dict[str, object], mesh: Mesh
) -> None:
    samples = 2 * mesh.size + 1
    partition, whole = BatchPartition(mesh, samples, (3,)), random(samples, 3)
    found, wanted = Coupled(samples, mesh.state_comm), Coupled(samples, MPI.COMM_SELF)
    settings = {"method": method, "options": options, "rtol": 1e-5, "atol": 1e-7}
    start, alone = partition.scatter(whole).requires_grad_(), whole.clone().requires_grad_()
    states = odeint_adjoint(found, start, TIMES, partition=partition, **settings)
    expected = odeint_adjoint(wanted, alone, TIMES, **settings)
    assert len(found.steps) == len(wanted.steps) > 9
    assert found.steps == mesh.state_comm.bcast(found.steps)
    owned = slice(*partition.owned)
    assert distance(states.detach(), expected.detach()[:, owned]) <= 1e-12
    torch.sin(states).sum().backward()
    torch.sin(expected).sum().backward()
    assert alone.grad is not None
    assert distance(start.grad, alone.grad[owned]) <= 1e-10
    assert distance(mesh.sum(found.matrix.grad), wanted.matrix.grad) <= 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dopri6"}, "method = 'dopri6'"),
        ({"options": {"safety": 2}}, "safety = 2.0"),
        ({"rtol": -1}, "rtol"),
        ({"event_fn": 3}, "event_fn = 3: must be a function of t and y"),
        ({"adjoint_params": ()}, "adjoint_params: leaves out 1 tensors"),
        ({"adjoint_params": 3}, "adjoint_params: must be a sequence of tensors"),
        ({"trajectory": 3}, "trajectory = 3: must be a pnode_dist.Trajectory"),
    ],
)
def test_a_wrong_argument_on_one_rank_is_an_error_on_all(
    arguments: dict[str, object], message: str, mesh: Mesh
) -> None:
    partition, func = BatchPartition(mesh, mesh.size, (3,)), Coupled(mesh.size, mesh.state_comm)
    start = partition.scatter(random(mesh.size, 3))
    given = arguments if mesh.rank == mesh.size - 1 else {}
    with pytest.raises(ConfigurationError, match=message):
        odeint_adjoint(func, start, TIMES, partition=partition, **given)
    assert torch.isfinite(odeint_adjoint(func, start, TIMES, partition=partition)).all()


@pytest.mark.parametrize(("name", "value", "other"), [("interp", "cubic", "linear"), ("perturb", True, False)])
def test_an_option_that_differs_between_ranks_is_an_error_on_all(
    name: str, value: object, other: object, mesh: Mesh
) -> None:
    partition, func = BatchPartition(mesh, mesh.size, (3,)), Coupled(mesh.size, mesh.state_comm)
    start = partition.scatter(random(mesh.size, 3))

    def solve(chosen: object) -> torch.Tensor:
        options = {"step_size": 0.25, name: chosen}
        return odeint_adjoint(func, start, TIMES, method="rk4", options=options, partition=partition)

    if mesh.size > 1:
        with pytest.raises(
            DisagreementError, match=f"the ranks differ in (.* and in )?{name}: rank 0: {value}; ranks? 1.*: {other}"
        ):
            solve(value if mesh.rank == 0 else other)
    assert torch.isfinite(solve(value)).all()


def test_a_norm_of_one_rank_s_part_is_refused_on_several_ranks(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, mesh.size, (3,))
    func = Coupled(mesh.size, mesh.state_comm)
    options = {"norm": lambda error: error.abs().max()}
    start = partition.scatter(random(mesh.size, 3))
    if mesh.size == 1:
        assert torch.isfinite(odeint_adjoint(func, start, TIMES, options=options, partition=partition)).all()
        return
    with pytest.raises(ConfigurationError, match="'norm': a function of this rank's part alone"):
        odeint_adjoint(func, start, TIMES, options=options, partition=partition)
