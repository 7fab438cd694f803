"""When the disk fails one rank, all ranks go on without theirs, to the same gradient."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.store import SpillError
from pnode_dist.nn import Conv2d
from pnode_dist.train import loop
from tests.conftest import PATIENCE
from tests.mpi.test_resume import TRAINING, Vectors

pytestmark = pytest.mark.mpi
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")


STEPS = 20


def new_node(mesh: Mesh, trajectory: Trajectory, **control: Any) -> NeuralODE:
    grid = GridPartition(mesh, (64, 65), 2, ("replicate", "periodic"))
    torch.manual_seed(5)
    convolution = Conv2d(grid, 2, 2, dtype=torch.float64)

    class Tendency(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = convolution

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.convolution(u)) * torch.cos(5 * t)

    return NeuralODE(Tendency(), step_size=1 / STEPS, partition=grid, trajectory=trajectory, **control)


def loss_of(node: NeuralODE) -> torch.Tensor:
    """The same initial state at every call."""
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(64, 65, 2, dtype=torch.float64, generator=generator)
    assert node.partition is not None
    u0 = node.partition.scatter(whole)
    return node(u0, [0.0, 1.0])[-1].square().sum()


def gradient(loss: torch.Tensor, node: NeuralODE) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in torch.autograd.grad(loss, list(node.parameters()))])


def slot_file(node: NeuralODE) -> Any:
    """This rank's file, once all that was to be written is."""
    (solver,) = node._solvers._solvers.values()
    file = solver.pools[Tier.DISK]._file
    with file.changed:
        assert file.changed.wait_for(lambda: not any(slot.busy for slot in file.slots), timeout=PATIENCE)
    return file


def flip_a_byte_of_every_slot(node: NeuralODE) -> None:
    """Damage this rank's file behind the program's back."""
    file = slot_file(node)
    states = file.open()["state"]
    with Path(file.open().filename).open("r+b") as raw:
        for number in range(states.id.get_num_chunks()):
            raw.seek(states.id.get_chunk_info(number).byte_offset + 100)
            byte = raw.read(1)[0]
            raw.seek(-1, os.SEEK_CUR)
            raw.write(bytes([byte ^ 1]))


def lose_the_file(node: NeuralODE) -> None:
    """Take this rank's directory away and the open file too, as with a file system that is no longer there."""
    file = slot_file(node).open()
    shutil.rmtree(Path(file.filename).parent)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, file.id.get_vfd_handle())
    os.close(nothing)


def differentiated(node: NeuralODE, mesh: Mesh, message: str, spoil: Any = None, where: int = 0) -> torch.Tensor:
    """The gradient where rank `where` loses its disk: rank 0 warns of it, once, and nobody else says anything."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss = loss_of(node)
        if spoil is not None and mesh.rank == where:
            spoil(node)
        found = gradient(loss, node)
    texts = [str(warning.message) for warning in said]
    if mesh.is_root:
        assert len(texts) == 1
        assert texts[0].startswith(f"trajectory: rank {where}: ")
        assert message in texts[0]
        assert texts[0].endswith("going on without checkpoints on disk")
    else:
        assert texts == []
    return found


def assert_done_without_the_disk(node: NeuralODE, expected: torch.Tensor, comm: MPI.Comm) -> None:
    """The next solve does not touch the disk on any rank, and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gradient(loss_of(node), node), expected)
    assert comm.allgather(node.last_solve.bytes_written) == [0] * comm.size


FIXED, CONTROLLED = "steps of fixed size", "error control"
CONTROLS = {FIXED: {}, CONTROLLED: {"method": "dopri5", "rtol": 1e-7, "atol": 1e-9}}
LAST = MPI.COMM_WORLD.size - 1


# Every fault with every control and number of slots is tried on one rank.
@pytest.mark.parametrize(
    ("spoil", "message", "ram_slots", "control"),
    [
        (flip_a_byte_of_every_slot, "its checksum is wrong", 0, FIXED),
        (flip_a_byte_of_every_slot, "its checksum is wrong", 2, CONTROLLED),
        (lose_the_file, "slot ", 2, FIXED),
        (lose_the_file, "slot ", 0, CONTROLLED),
    ],
)
def test_what_one_rank_s_disk_loses_changes_no_bit_of_the_gradient_of_any(
    spoil: Any, message: str, ram_slots: int, control: str, mesh: Mesh, comm: MPI.Comm, mpi_tmp_path: Path
) -> None:
    settings = CONTROLS[control]
    ample = new_node(mesh, Trajectory(keep="solution"), **settings)
    expected = gradient(loss_of(ample), ample)
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=4, directory=mpi_tmp_path)
    node = new_node(mesh, trajectory, **settings)
    assert torch.equal(differentiated(node, mesh, message, spoil, where=LAST), expected)
    assert node.last_solve.adjoint_steps == node.last_solve.forward_steps >= 5
    assert_done_without_the_disk(node, expected, comm)


@contextmanager
def little_room(kind: str, place: Path) -> Iterator[None]:
    """For so long as a disk with room for some checkpoints but not for all: a small file system, or a limit."""
    if kind == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("kind", "message", "control"),
    [
        pytest.param(
            "full",
            "could not be written: No space left on device",
            FIXED,
            marks=needs_root,
        ),
        ("limited", "could not be written: File too large", CONTROLLED),
    ],
)
def test_one_rank_s_full_disk_changes_no_bit_of_the_gradient_of_any(
    kind: str, message: str, control: str, mesh: Mesh, comm: MPI.Comm, mpi_tmp_path: Path
) -> None:
    settings = CONTROLS[control]
    ample = new_node(mesh, Trajectory(keep="solution"), **settings)
    expected = gradient(loss_of(ample), ample)
    place = mpi_tmp_path / f"rank{mesh.rank}"
    place.mkdir()
    # A state is 65 KiB on 1 rank and 17 KiB on 4.
    trajectory = Trajectory(ram_slots=1, disk_slots=16, directory=place)
    node = new_node(mesh, trajectory, **settings)
    comm.barrier()
    if mesh.rank == LAST:
        with little_room(kind, place):
            found = differentiated(node, mesh, message, where=LAST)
    else:
        found = differentiated(node, mesh, message, where=LAST)
    assert torch.equal(found, expected)
    assert_done_without_the_disk(node, expected, comm)


@needs_root
def test_with_raise_one_rank_s_full_disk_ends_every_rank_with_its_message(
    mesh: Mesh, comm: MPI.Comm, mpi_tmp_path: Path
) -> None:
    place = mpi_tmp_path / f"rank{mesh.rank}"
    place.mkdir()
    node = new_node(mesh, Trajectory(ram_slots=1, disk_slots=16, directory=place, on_spill_error="raise"))
    comm.barrier()
    with (
        little_room("full", place) if mesh.rank == LAST else nullcontext(),
        pytest.raises(
            SpillError, match=rf"^trajectory: rank {LAST}: .* could not be written: No space left on device$"
        ),
    ):
        gradient(loss_of(node), node)


class Shrinking(Vectors):
    """Solves of ten steps, whose checkpoints but one go to a directory that the last rank loses after a while."""

    def __init__(self, mesh: Mesh, place: Path | None) -> None:
        super().__init__(mesh)
        self.model.step_size = 0.1
        self.place, self.calls = place, 0
        if place is not None:
            self.model.trajectory = Trajectory(ram_slots=1, disk_slots=4, directory=place)

    def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and self.place is not None and self.mesh.rank == LAST:
            shutil.rmtree(self.place)
        return super().loss(model, batch)


def test_a_scratch_directory_that_disappears_during_training_changes_no_bit_of_it(
    mesh: Mesh, comm: MPI.Comm, mpi_tmp_path: Path
) -> None:
    place = mpi_tmp_path / f"rank{mesh.rank}"
    place.mkdir()
    whole: Any = Shrinking(mesh, None)
    problem: Any = Shrinking(mesh, place)
    for each, name in ((whole, "whole"), (problem, "run")):
        if mesh.is_root:
            (mpi_tmp_path / name).mkdir()
        comm.barrier()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loop.train(each, TRAINING, mesh, mpi_tmp_path / name)
    assert all(map(torch.equal, problem.parameters(), whole.parameters()))
    assert problem.solve_statistics().bytes_written == 0
    texts = [str(warning.message) for warning in said]
    assert len(texts) == int(mesh.is_root)
    assert all(text.endswith(" cannot; going on without checkpoints on disk") for text in texts)
    assert all(text.count("trajectory: ") == 1 for text in texts)
    assert all(f"; rank {LAST} (" in text for text in texts)


def test_with_raise_every_rank_ends_with_the_failing_rank_s_message(mesh: Mesh, mpi_tmp_path: Path) -> None:
    trajectory = Trajectory(ram_slots=0, disk_slots=4, directory=mpi_tmp_path, on_spill_error="raise")
    node = new_node(mesh, trajectory)
    loss = loss_of(node)
    if mesh.rank == 0:
        flip_a_byte_of_every_slot(node)
    with pytest.raises(SpillError, match=r"trajectory: rank 0: slot \d+ is damaged"):
        gradient(loss, node)
