"""A disk that fails costs time, never the gradient; nothing of ours stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.trajectory import scratch
from pnode_dist.trajectory.schedule import Tier
from pnode_dist.trajectory.store import SpillError

STEPS = 24


class Net(nn.Module):
    """A right-hand side whose state of 128 KiB no small file system holds many of."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ self.matrix) * torch.cos(t)


def solve_and_differentiate(
    trajectory: Trajectory, spoil: Callable[[NeuralODE], None] = lambda node: None
) -> tuple[torch.Tensor, NeuralODE]:
    torch.manual_seed(3)
    node = NeuralODE(Net(), step_size=1 / STEPS, trajectory=trajectory)
    u0 = torch.randn(4096, 4, dtype=torch.float64, requires_grad=True)
    loss = node(u0, [0.0, 1.0])[-1].square().sum()
    spoil(node)
    gradients = torch.autograd.grad(loss, [u0, *node.parameters()])
    return torch.cat([value.reshape(-1) for value in gradients]), node


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return solve_and_differentiate(Trajectory(keep="solution"))[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 640 KiB: room for the file and four checkpoints."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def flip_a_byte(node: NeuralODE) -> None:
    """Damage the first slot behind the program's back, once it is on disk."""
    (solver,) = node._solvers._solvers.values()
    file = solver.pools[Tier.DISK]._file
    with file.changed:
        assert file.changed.wait_for(lambda: not any(slot.busy for slot in file.slots), timeout=30)
    file.open().flush()
    dataset = file.slots[0].dataset
    with Path(file.open().filename).open("r+b") as raw:
        raw.seek(dataset.id.get_offset() + 1000)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("ram_slots", [0, 1, 3])
def test_a_full_disk_costs_steps_but_not_a_bit_of_the_gradient(
    ram_slots: int, small_disk: Path, expected: torch.Tensor
) -> None:
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=12, directory=small_disk)
    with pytest.warns(RuntimeWarning, match=r"rank 0: checkpoint of step \d+ could not be written: No space left"):
        gradient, node = solve_and_differentiate(trajectory)
    assert torch.equal(gradient, expected)
    assert node.last_solve.adjoint_steps == STEPS


def test_after_a_full_disk_the_next_solve_does_without_it_and_does_not_warn_again(
    small_disk: Path, expected: torch.Tensor
) -> None:
    trajectory = Trajectory(ram_slots=2, disk_slots=12, directory=small_disk)
    with pytest.warns(RuntimeWarning, match="going on without checkpoints on disk"):
        _, node = solve_and_differentiate(trajectory)
    torch.manual_seed(3)
    Net()
    u0 = torch.randn(4096, 4, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = node(u0, [0.0, 1.0])[-1].square().sum()
        gradients = torch.autograd.grad(loss, [u0, *node.parameters()])
    assert torch.equal(torch.cat([value.reshape(-1) for value in gradients]), expected)
    assert node.last_solve.bytes_written == 0


@pytest.mark.parametrize("ram_slots", [0, 2])
def test_a_flipped_byte_is_noticed_and_costs_only_steps(ram_slots: int, tmp_path: Path, expected: torch.Tensor) -> None:
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=4, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"slot 0 is damaged: its checksum is wrong; going on without"):
        gradient, _ = solve_and_differentiate(trajectory, flip_a_byte)
    assert torch.equal(gradient, expected)


def test_a_flipped_byte_ends_the_solve_where_that_was_asked_for(tmp_path: Path) -> None:
    trajectory = Trajectory(ram_slots=0, disk_slots=4, directory=tmp_path, on_spill_error="raise")
    with pytest.raises(SpillError, match="trajectory: rank 0: slot 0 is damaged: its checksum is wrong"):
        solve_and_differentiate(trajectory, flip_a_byte)


def test_without_faults_nothing_is_recomputed_on_their_account(tmp_path: Path, expected: torch.Tensor) -> None:
    gradient, node = solve_and_differentiate(Trajectory(ram_slots=0, disk_slots=4, directory=tmp_path))
    _, in_memory = solve_and_differentiate(Trajectory(ram_slots=4))
    assert torch.equal(gradient, expected)
    assert node.last_solve.recomputed_steps == in_memory.last_solve.recomputed_steps
    assert node.last_solve.bytes_written > 0


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="on_spill_error = 'ignore': must be one of recompute, raise"):
        Trajectory(on_spill_error="ignore")


SPILLING = """
import sys, time
from pathlib import Path
import torch
from pnode_dist import NeuralODE, Trajectory

directory = Path(sys.argv[1])
node = NeuralODE(lambda t, u: -u, step_size=0.05, trajectory=Trajectory(ram_slots=1, disk_slots=3, directory=directory))
solution = node(torch.ones(3, dtype=torch.float64, requires_grad=True), [0.0, 1.0])

def wait(gradient):
    print("in the backward pass", flush=True)
    time.sleep(60)

solution.register_hook(wait)
solution.sum().backward()
"""


def spilling_process(directory: Path) -> subprocess.Popen[str]:
    """A process in the middle of a backward pass, with its checkpoints on disk."""
    process = subprocess.Popen([sys.executable, "-c", SPILLING, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in the backward pass\n"
    assert list(directory.rglob("*.h5"))
    return process


def test_sigterm_in_the_backward_pass_leaves_nothing_and_ends_the_process_as_it_should(tmp_path: Path) -> None:
    process = spilling_process(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_GRACE", 0.0)
    living, killed = spilling_process(tmp_path), spilling_process(tmp_path)
    try:
        killed.kill()
        killed.wait(timeout=30)
        assert len(list(tmp_path.iterdir())) == 2
        time.sleep(0.01)
        directory = scratch.PrivateDirectory(tmp_path)
        remaining = [path for path in tmp_path.iterdir() if path != directory.path]
        assert len(remaining) == 1
        assert list(remaining[0].glob("*.h5"))
        directory.remove()
    finally:
        living.terminate()
        living.wait(timeout=30)
    assert list(tmp_path.iterdir()) == []
