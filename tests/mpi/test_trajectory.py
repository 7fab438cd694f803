"""Checkpoints at several ranks: one schedule for all, the same bits whatever is kept, a file for every rank."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import BatchPartition, GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import global_sum
from pnode_dist.nn import Conv2d
from pnode_dist.ode.methods import resolve
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.right_hand_sides import identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES, STEPS = [0.0, 0.3, 0.9], 9
NUMBER = 8


class Coupled(nn.Module):
    """Samples coupled by their mean: a rank on a schedule of its own would wait for ever."""

    def __init__(self, comm: MPI.Comm, samples: int) -> None:
        super().__init__()
        self.comm, self.samples = comm, samples
        self.matrix = nn.Parameter(0.3 * random(3, 3))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.sum(0), self.comm) / self.samples
        return torch.tanh(u @ self.matrix) - t * u * mean


class Flow(nn.Module):
    """A convolution and a nonlinearity."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = Conv2d(partition, 2, 2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(u)) * torch.cos(t)


def gradient(node: NeuralODE, u0: torch.Tensor) -> tuple[torch.Tensor, ...]:
    start = u0.detach().clone().requires_grad_()
    solution = node(start, TIMES)
    found = torch.autograd.grad(torch.sin(solution).sum(), [start, *node.parameters()])
    return (solution.detach(), *found)


@pytest.fixture
def scratch(tmp_path: Path, comm: MPI.Comm) -> Path:
    """One directory for all ranks."""
    path: Path = comm.bcast(tmp_path)
    return path


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_gradient_of_a_flow_has_the_same_bits_under_every_budget(method: str, mesh: Mesh, scratch: Path) -> None:
    partition = GridPartition(mesh, (7, 9), channels=2, boundary=("replicate", "periodic"))
    node = NeuralODE(Flow(partition), method=method, step_size=0.1, partition=partition)
    u0 = partition.scatter(random(7, 9, 2))
    ample = gradient(node, u0)
    for trajectory in (Trajectory(ram=3000), Trajectory(keep="solution"), Trajectory(keep="graph")):
        node.trajectory = trajectory
        assert identical(gradient(node, u0), ample), trajectory
    for ram, disk in ((4, 0), (2, 4), (0, 3)):
        node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=scratch)
        assert identical(gradient(node, u0), ample), (ram, disk)
        solve = node.last_solve
        assert solve.forward_steps + solve.recomputed_steps == fewest_solve_steps(STEPS, ram + disk)
        assert (solve.bytes_written > 0) == (disk > 0)


def test_the_gradient_of_coupled_samples_has_the_same_bits_under_every_budget(mesh: Mesh, scratch: Path) -> None:
    samples = 2 * mesh.size + 1
    partition = BatchPartition(mesh, samples, (3,))
    node = NeuralODE(Coupled(partition.comm, samples), step_size=0.1, partition=partition)
    u0 = partition.scatter(random(samples, 3))
    ample = gradient(node, u0)
    for trajectory in (Trajectory(ram=3000), Trajectory(keep="solution"), Trajectory(keep="graph")):
        node.trajectory = trajectory
        assert identical(gradient(node, u0), ample), trajectory
    for ram, disk in ((4, 0), (2, 4), (0, 3)):
        node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=scratch)
        assert identical(gradient(node, u0), ample), (ram, disk)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_float32_state_has_half_the_bytes_and_a_gradient_right_to_rounding(
    method: str, mesh: Mesh, comm: MPI.Comm, scratch: Path
) -> None:
    samples = mesh.size + 1
    partition, whole = BatchPartition(mesh, samples, (3,)), random(samples, 3, dtype=torch.float32)
    u0, found, counts = partition.scatter(whole), [], []
    for dtype in (torch.float32, torch.float64):
        func = Coupled(comm, samples).float()
        node = NeuralODE(func, method=method, step_size=0.1, partition=partition, state_dtype=dtype)
        ample = gradient(node, u0)
        node.trajectory = Trajectory(ram_slots=2, disk_slots=2, directory=scratch)
        found.append(gradient(node, u0))
        assert identical(found[-1], ample)
        assert {part.dtype for part in ample} == {torch.float32}
        counts.append(node.last_solve)
    half, full = counts
    assert full.checkpoint_bytes_peak == 2 * half.checkpoint_bytes_peak == 4 * partition.local_shape[0] * 3 * NUMBER
    assert full.bytes_written == 2 * half.bytes_written > 0
    # Plain torch in float64, on the whole batch.
    exact = Coupled(MPI.COMM_SELF, samples).float().double()
    start = whole.double().requires_grad_()
    solution = odeint_plain(exact, start, TIMES, TABLEAUX[resolve(method).petsc_name], 0.1)
    by_state, by_matrix = torch.autograd.grad(torch.sin(solution).sum(), [start, exact.matrix])
    own = slice(*partition.owned)
    for states, of_state, of_matrix in found:
        for part, wanted in ((states, solution.detach()[:, own]), (of_state, by_state[own])):
            assert torch.allclose(part.double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.allclose(mesh.sum(of_matrix).double(), by_matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "memory and disk"])
def test_ranks_with_uneven_shares_follow_the_schedule_of_the_fullest(
    disk: bool, mesh: Mesh, comm: MPI.Comm, scratch: Path
) -> None:
    # With one sample each, and two on rank 0, a budget pays for half as many checkpoints there as elsewhere.
    samples = mesh.size + 1
    partition = BatchPartition(mesh, samples, (3,))
    assert comm.allgather(partition.local_shape[0]) == [2] + [1] * (mesh.size - 1)
    fullest = 2 * 3 * NUMBER
    disk_bytes = 2 * fullest if disk else 0
    trajectory = Trajectory(3 * fullest + 1, disk_bytes, scratch, keep="solution", schedule="multistage")
    node = NeuralODE(Coupled(comm, samples), step_size=0.1, partition=partition, trajectory=trajectory)
    u0 = partition.scatter(random(samples, 3))
    found = gradient(node, u0)
    solve = node.last_solve
    # A tape is larger than the budget.
    assert solve.forward_steps + solve.recomputed_steps == fewest_solve_steps(STEPS, 5 if disk else 3, tapes=0)
    assert (solve.bytes_written > 0) == disk
    assert solve.checkpoint_bytes_peak == (5 if disk else 3) * partition.local_shape[0] * 3 * NUMBER
    node.trajectory = None
    assert identical(found, gradient(node, u0))


def test_a_rank_that_owns_nothing_limits_nobody_and_follows(mesh: Mesh, comm: MPI.Comm, scratch: Path) -> None:
    partition = BatchPartition(mesh, 1, (3,))
    size = 2 * 3 * NUMBER
    trajectory = Trajectory(ram=size, disk=size, directory=scratch, keep="solution", schedule="multistage")
    node = NeuralODE(Coupled(comm, 1), step_size=0.1, partition=partition, trajectory=trajectory)
    u0 = partition.scatter(random(1, 3))
    found = gradient(node, u0)
    solve = node.last_solve
    assert solve.forward_steps + solve.recomputed_steps == fewest_solve_steps(STEPS, 4, tapes=0)
    node.trajectory = None
    assert identical(found, gradient(node, u0))


def test_every_rank_spills_its_own_part_into_its_own_file(mesh: Mesh, comm: MPI.Comm, scratch: Path) -> None:
    partition = GridPartition(mesh, (7, 9), channels=2, boundary=("replicate", "periodic"))
    trajectory = Trajectory(ram_slots=0, disk_slots=3, directory=scratch)
    node = NeuralODE(Flow(partition), step_size=0.0625, partition=partition, trajectory=trajectory)
    u0 = partition.scatter(random(7, 9, 2)).requires_grad_()
    states = NeuralODE(node.func, partition=partition)(u0, np.linspace(0, 1, 17).tolist()).detach()
    solution = node(u0, [0.0, 1.0])
    (solver,) = node._solvers._solvers.values()
    solver.pools[Tier.DISK]._file.finish()
    comm.barrier()
    files = list(scratch.rglob("*.h5"))
    assert len(files) == mesh.size
    (own,) = (path for path in files if path.name == f"trajectory-rank{comm.rank}.h5")
    with h5py.File(own, "r", locking=False) as file:
        assert file.attrs["rank"] == comm.rank
        used = file["label"]["step"] >= 0
        mine = list(zip(file["label"]["step"][used].tolist(), file["state"][used], strict=True))
    assert len(mine) == 3
    for step, content in mine:
        assert np.array_equal(content.reshape(partition.local_shape), states[step].numpy())
    comm.barrier()
    solution.sum().backward()
    assert node.last_solve.bytes_written > 0
    assert node.last_solve.bytes_read > 0
    del node, solution, solver
    comm.barrier()
    assert list(scratch.iterdir()) == []


def test_a_budget_too_small_for_the_fullest_rank_is_refused_on_all(mesh: Mesh, comm: MPI.Comm) -> None:
    samples = mesh.size + 1
    partition = BatchPartition(mesh, samples, (3,))
    fullest = 2 * 3 * NUMBER
    node = NeuralODE(Coupled(comm, samples), step_size=0.1, partition=partition, trajectory=Trajectory(ram=fullest - 1))
    u0 = partition.scatter(random(samples, 3))
    with pytest.raises(ConfigurationError, match="too small for one checkpoint") as caught:
        node(u0, TIMES)
    assert str(caught.value).endswith(f"ram = {fullest}")
    node.trajectory = Trajectory(ram=fullest)
    assert node(u0, TIMES).shape[0] == 3


def test_a_scratch_directory_missing_on_one_rank_is_refused_on_all(mesh: Mesh, comm: MPI.Comm, scratch: Path) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    last = mesh.rank == mesh.size - 1
    trajectory = Trajectory(ram_slots=1, disk_slots=2, directory=scratch / "missing" if last else scratch)
    node = NeuralODE(Coupled(comm, 2 * mesh.size), step_size=0.1, partition=partition, trajectory=trajectory)
    with pytest.raises(ConfigurationError, match="trajectory: directory") as caught:
        node(partition.scatter(random(2 * mesh.size, 3)), TIMES)
    assert "\n" not in str(caught.value)
    assert not last or "missing" in str(caught.value)
