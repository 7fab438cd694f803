"""Error control at several ranks: the steps of the whole state, the same on all ranks, and one plan for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import BatchPartition, GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.errors import StepSizeError
from pnode_dist.exchange import global_sum
from pnode_dist.nn import Conv2d
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, identical, random

pytestmark = pytest.mark.mpi

TIMES = [0.0, 0.6, 2.0]
SHAPE, BOUNDARY = (7, 9), ("replicate", "periodic")
METHODS = ["bosh3", "dopri5"]


class Flow(nn.Module):
    """A convolution and a nonlinearity, on a partitioned grid or, as `whole`, on all of it."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = Conv2d(partition, 2, 2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(self.conv(u)) * torch.cos(5 * t)

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result = convolved(u[None], BOUNDARY, self.conv.weight, self.conv.bias)[0]
        return 3 * torch.tanh(result) * torch.cos(5 * t)


class Coupled(nn.Module):
    """Samples coupled by their mean: a rank that takes other steps would wait for ever."""

    def __init__(self, samples: int, comm: MPI.Comm) -> None:
        super().__init__()
        self.samples, self.comm = samples, comm
        self.matrix = nn.Parameter(0.9 * random(3, 3))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.sum(0), self.comm) / self.samples
        return 3 * torch.tanh(u @ self.matrix) - torch.cos(5 * t) * u * torch.tanh(mean)

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(u @ self.matrix) - torch.cos(5 * t) * u * torch.tanh(u.mean(0))


Problem = tuple[Any, nn.Module, torch.Tensor]


@pytest.fixture(params=["flow", "coupled samples", "some ranks own nothing"])
def problem(request: pytest.FixtureRequest, mesh: Mesh) -> Problem:
    """A partition, a right-hand side with its serial twin, and the whole initial state."""
    if request.param == "flow":
        partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
        return partition, Flow(partition), random(*SHAPE, 2)
    samples = 1 if "nothing" in request.param else 2 * mesh.size + 1
    return BatchPartition(mesh, samples, (3,)), Coupled(samples, mesh.state_comm), random(samples, 3)


@pytest.fixture
def scratch(tmp_path: Path, comm: MPI.Comm) -> Path:
    """One directory for all ranks."""
    path: Path = comm.bcast(tmp_path)
    return path


def here(whole: torch.Tensor, partition: Any) -> torch.Tensor:
    """This rank's part of a global tensor with an axis in front."""
    if isinstance(partition, GridPartition):
        (y0, y1), (x0, x1) = partition.owned
        return whole[:, y0:y1, x0:x1, :]
    return whole[:, slice(*partition.owned)]


def serially(func: nn.Module, **settings: Any) -> NeuralODE:
    """The same solve on every rank for itself."""
    parameters = list(func.parameters())
    return NeuralODE(func.whole, params=parameters, **settings)  # type: ignore[arg-type]


def gradient(node: NeuralODE, u0: torch.Tensor, wanted: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    start = u0.detach().clone().requires_grad_()
    solution = node(start, TIMES)
    found = torch.autograd.grad(torch.sin(solution).sum(), [start, *wanted])
    return (solution.detach(), *found)


def steps(node: NeuralODE) -> tuple[int, int]:
    return node.last_solve.forward_steps, node.last_solve.rejected_steps


@pytest.mark.parametrize("times", [1, -1], ids=["forward", "backward in time"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_states_and_gradient_are_those_of_the_whole_state(
    method: str, times: int, problem: Problem, mesh: Mesh
) -> None:
    partition, func, whole = problem
    parameters = list(func.parameters())
    settings: dict[str, Any] = {"method": method, "rtol": 1e-5, "atol": 1e-7, "step_size": 0.7}
    serial, spread = serially(func, **settings), NeuralODE(func, partition=partition, **settings)
    alone, start = whole.clone().requires_grad_(), partition.scatter(whole).requires_grad_()
    wanted, found = serial(alone, TIMES[::times]), spread(start, TIMES[::times])
    assert steps(spread) == steps(serial)
    assert spread.last_solve.forward_steps > 5
    assert spread.last_solve.rejected_steps > 0
    assert distance(found, here(wanted.detach(), partition)) <= 1e-12
    expected = torch.autograd.grad(torch.sin(wanted).sum(), [alone, *parameters])
    gradients = torch.autograd.grad(torch.sin(found).sum(), [start, *parameters])
    assert distance(gradients[0], here(expected[0][None], partition)[0]) <= 1e-10
    assert distance([mesh.sum(value) for value in gradients[1:]], expected[1:]) <= 1e-10


def test_the_first_step_is_chosen_for_the_whole_state(problem: Problem) -> None:
    partition, func, whole = problem
    serial = serially(func, rtol=1e-5, atol=1e-7)
    spread = NeuralODE(func, rtol=1e-5, atol=1e-7, partition=partition)
    with torch.no_grad():
        wanted, found = serial(whole, TIMES), spread(partition.scatter(whole), TIMES)
    assert steps(spread) == steps(serial)
    assert distance(found, here(wanted, partition)) <= 1e-12


def test_the_gradient_has_the_same_bits_under_every_budget(problem: Problem, scratch: Path, comm: MPI.Comm) -> None:
    partition, func, whole = problem
    u0, parameters = partition.scatter(whole), list(func.parameters())
    node = NeuralODE(func, method="dopri5", rtol=1e-5, atol=1e-7, step_size=0.7, partition=partition)
    node.trajectory = Trajectory("8MiB")
    ample = gradient(node, u0, parameters)
    assert node.last_solve.recomputed_steps == 0
    graph_bytes = comm.allreduce(node.last_solve.graph_bytes, MPI.MAX)
    for trajectory in (
        Trajectory(keep="solution"),
        Trajectory(ram=graph_bytes // 2),
        Trajectory(ram_slots=2),
        Trajectory(ram_slots=2, disk_slots=2, directory=scratch),
        Trajectory(ram_slots=0, disk_slots=3, directory=scratch),
    ):
        node.trajectory = trajectory
        assert identical(gradient(node, u0, parameters), ample), trajectory
        assert node.last_solve.recomputed_steps >= node.last_solve.forward_steps
        assert len(set(comm.allgather((steps(node), node.last_solve.recomputed_steps)))) == 1
    # Stage by stage the same numbers are added in another order than in the graph of a step, on one rank.
    node.trajectory = Trajectory(keep="stages")
    assert distance(gradient(node, u0, parameters), ample) <= 1e-14


@pytest.mark.parametrize("adaptor", ["basic", "dsp", "pid"])
def test_tolerances_of_each_component_are_heeded_on_the_rank_that_owns_it(adaptor: str, problem: Problem) -> None:
    partition, func, whole = problem
    atol = 10.0 ** torch.linspace(-9, -3, whole.numel(), dtype=torch.float64).reshape(whole.shape)
    settings: dict[str, Any] = {"rtol": 1e-6, "step_size": 0.5, "adaptor": adaptor}
    serial = serially(func, atol=atol, **settings)
    spread = NeuralODE(func, atol=partition.scatter(atol), partition=partition, **settings)
    with torch.no_grad():
        wanted, found = serial(whole, TIMES), spread(partition.scatter(whole), TIMES)
        assert steps(spread) == steps(serial)
        assert distance(found, here(wanted, partition)) <= 1e-12
        # They do differ from the steps that any of the tolerances would have led to everywhere.
        serial.atol = float(atol.min())
        serial(whole, TIMES)
        assert steps(serial) != steps(spread)


def _nan_from(fail: Callable[[torch.Tensor], bool], samples: int, comm: MPI.Comm) -> Coupled:
    class Failing(Coupled):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            result = super().forward(t, u)
            return torch.full_like(result, torch.nan) if fail(t) else result

    return Failing(samples, comm)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_where_f_is_no_number_on_one_rank_all_are_told_together(
    needs_gradient: bool, mesh: Mesh, comm: MPI.Comm
) -> None:
    samples = 2 * mesh.size
    partition = BatchPartition(mesh, samples, (3,))
    func = _nan_from(lambda t: mesh.rank == mesh.size - 1 and float(t) > 1.0, samples, comm)
    node = NeuralODE(func, rtol=1e-5, atol=1e-7, partition=partition)
    u0 = partition.scatter(random(samples, 3)).requires_grad_(needs_gradient)
    with (
        pytest.raises(StepSizeError, match=r"step [0-9]+ at t = (1|0\.999[0-9]*):") as caught,
        torch.set_grad_enabled(needs_gradient),
    ):
        node(u0, TIMES)
    assert len(set(comm.allgather(str(caught.value)))) == 1
    # And go on together.
    with torch.set_grad_enabled(needs_gradient):
        assert bool(torch.isfinite(node(u0, [0.0, 0.9])).all())


@pytest.mark.parametrize("settings", [{}, {"adaptor": "pid"}], ids=["basic", "pid"])
def test_a_step_that_is_too_short_is_reported_with_the_rank_of_the_largest_error(
    settings: dict[str, Any], mesh: Mesh, comm: MPI.Comm
) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    rank = mesh.size - 1

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rates = torch.ones_like(u)
        rates[1, 2] = 1e9 if mesh.rank == rank else 1.0
        return torch.where(t < 0.5, -u, rates * u)

    node = NeuralODE(func, rtol=1e-6, atol=1e-9, dt_min=1e-3, partition=partition, **settings)
    with torch.no_grad(), pytest.raises(StepSizeError, match=r"dt_min = 0\.001 allows no smaller one") as caught:
        node(partition.scatter(torch.ones(2 * mesh.size, 3, dtype=torch.float64)), [0.0, 1.0])
    where = "" if mesh.size == 1 else f" of rank {rank}"
    assert f"the error of entry [1, 2]{where} is " in str(caught.value)
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_steps_with_the_two_estimates_of_dop853_are_those_of_the_whole_state(problem: Problem) -> None:
    partition, func, whole = problem
    settings: dict[str, Any] = {"method": "dop853", "rtol": 1e-7, "atol": 1e-9, "first_step": 0.7}
    serial, spread = serially(func, **settings), NeuralODE(func, partition=partition, **settings)
    with torch.no_grad():
        wanted, found = serial(whole, TIMES), spread(partition.scatter(whole), TIMES)
    assert steps(spread) == steps(serial)
    assert spread.last_solve.rejected_steps > 0
    assert distance(found, here(wanted, partition)) <= 1e-12


def test_what_is_no_number_for_a_moment_is_stepped_around_on_all_ranks(mesh: Mesh, comm: MPI.Comm) -> None:
    samples = mesh.size
    partition = BatchPartition(mesh, samples, (3,))
    # Too long a first step is answered with no number on one rank: all try a shorter one.
    tried: list[float] = []

    def far(t: torch.Tensor) -> bool:
        tried.append(float(t))
        return mesh.rank == 0 and len(tried) < 8 and float(t) > 0.25

    node = NeuralODE(_nan_from(far, samples, comm), rtol=1e-5, atol=1e-7, step_size=2.0, partition=partition)
    with torch.no_grad():
        found = node(partition.scatter(random(samples, 3)), TIMES)
    assert bool(torch.isfinite(found).all())
    assert node.last_solve.rejected_steps > 0
    assert len(set(comm.allgather(steps(node)))) == 1


# One plan for all


@pytest.mark.parametrize("schedule", ["auto", "h-revolve"])
def test_all_ranks_choose_one_plan_though_shares_and_disks_differ(
    schedule: str, mesh: Mesh, comm: MPI.Comm, scratch: Path
) -> None:
    samples = mesh.size + 1
    partition = BatchPartition(mesh, samples, (3,))
    fullest = 2 * 3 * 8
    # Every rank has another disk and another part of it; the last one the least memory.
    directory = scratch / f"rank{comm.rank}"
    directory.mkdir()
    last = comm.rank == comm.size - 1
    trajectory = Trajectory(
        (6 if last else 9) * fullest, (4 + comm.rank) * fullest, directory, schedule=schedule, keep="auto"
    )
    node = NeuralODE(Coupled(samples, comm), step_size=0.05, partition=partition, trajectory=trajectory)
    u0 = partition.scatter(random(samples, 3))
    plans = node.plan(u0, TIMES)
    assert plans.slots.ram_bytes == 6 * fullest
    assert plans.slots.disk == 4
    everywhere = comm.allgather(plans.as_dict())
    assert all(other == everywhere[0] for other in everywhere)
    start = u0.clone().requires_grad_()
    solution = node(start, TIMES)
    assert node.last_plan is not None
    chosen = comm.allgather(node.last_plan.as_dict())
    assert all(other == chosen[0] for other in chosen)
    found = torch.autograd.grad(torch.sin(solution).sum(), [start, *node.parameters()])
    node.trajectory = None
    ample = torch.autograd.grad(torch.sin(node(start, TIMES)).sum(), [start, *node.parameters()])
    assert identical(found, ample)


def test_every_candidate_gives_the_same_bits_on_all_ranks(mesh: Mesh, comm: MPI.Comm, scratch: Path) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=BOUNDARY)
    fullest = comm.allreduce(partition.scatter(random(*SHAPE, 2)).numel(), MPI.MAX) * 8
    trajectory = Trajectory(12 * fullest, 3 * fullest, scratch)
    node = NeuralODE(Flow(partition), step_size=0.1, partition=partition, trajectory=trajectory)
    u0, parameters = partition.scatter(random(*SHAPE, 2)), list(node.parameters())
    plans = node.plan(u0, TIMES)
    ample = None
    assert len(plans.candidates) >= 2
    for candidate in plans.candidates:
        node.fixed_plan = candidate
        found = gradient(node, u0, parameters)
        ample = ample or found
        assert identical(found, ample), candidate.name
        assert node.last_solve.recomputed_steps == candidate.recomputed_steps
        assert node.last_solve.bytes_written == candidate.disk_writes * u0.numel() * 8
