"""When the disk fails one rank, all ranks go on without theirs, to the same gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.nn import Conv2d
from pnode_dist.trajectory.schedule import Tier
from pnode_dist.trajectory.store import SpillError

pytestmark = pytest.mark.mpi


def loss_and_node(mesh: Mesh, trajectory: Trajectory) -> tuple[torch.Tensor, NeuralODE]:
    grid = GridPartition(mesh, (9, 11), 2, ("replicate", "periodic"))
    torch.manual_seed(5)
    convolution = Conv2d(grid, 2, 2, dtype=torch.float64)

    class Tendency(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = convolution

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.convolution(u))

    node = NeuralODE(Tendency(), step_size=0.05, partition=grid, trajectory=trajectory)
    whole = torch.randn(9, 11, 2, dtype=torch.float64)
    u0 = grid.scatter(whole if mesh.state_rank == 0 else None)
    return node(u0, [0.0, 1.0])[-1].square().sum(), node


def gradient(loss: torch.Tensor, node: NeuralODE) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in torch.autograd.grad(loss, list(node.parameters()))])


def damage(node: NeuralODE) -> None:
    """Make every slot of this rank look damaged."""
    (solver,) = node._solvers._solvers.values()
    file = solver.pools[Tier.DISK]._file
    with file.changed:
        assert file.changed.wait_for(lambda: not any(slot.busy for slot in file.slots), timeout=30)
    for slot in file.slots:
        slot.crc ^= 1


@pytest.mark.parametrize("ram_slots", [0, 2])
def test_one_rank_s_damaged_checkpoints_do_not_change_the_gradient_of_any(
    mesh: Mesh, mpi_tmp_path: Path, ram_slots: int
) -> None:
    expected = gradient(*loss_and_node(mesh, Trajectory(keep="solution")))
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=4, directory=mpi_tmp_path)
    loss, node = loss_and_node(mesh, trajectory)
    last = mesh.size - 1
    if mesh.rank == last:
        damage(node)
    if mesh.is_root:
        with pytest.warns(RuntimeWarning, match=rf"rank {last}: slot \d+ is damaged"):
            found = gradient(loss, node)
    else:
        found = gradient(loss, node)
    assert torch.equal(found, expected)
    assert node.last_solve.adjoint_steps == 20


def test_with_raise_every_rank_ends_with_the_failing_rank_s_message(mesh: Mesh, mpi_tmp_path: Path) -> None:
    trajectory = Trajectory(ram_slots=0, disk_slots=4, directory=mpi_tmp_path, on_spill_error="raise")
    loss, node = loss_and_node(mesh, trajectory)
    if mesh.rank == 0:
        damage(node)
    with pytest.raises(SpillError, match=r"trajectory: rank 0: slot \d+ is damaged"):
        gradient(loss, node)
