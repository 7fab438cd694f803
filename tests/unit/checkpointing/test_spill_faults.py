"""A disk that fails costs time, never the gradient; nothing of ours stays behind."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.store import SpillError
from pnode_dist.system import scratch
from tests.conftest import PATIENCE

STEPS = 24


class Net(nn.Module):
    """A right-hand side whose state of 128 KiB no small file system holds many of."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ self.matrix) * torch.cos(t)


def solve_and_differentiate(
    trajectory: Trajectory,
    spoil: Callable[[NeuralODE], None] = lambda node: None,
    observe: Callable[..., None] = lambda *_: None,
    **control: Any,
) -> tuple[torch.Tensor, NeuralODE]:
    """The gradient of a solve with `spoil` done between its passes and `observe` before every evaluation of f."""
    torch.manual_seed(3)
    net = Net()
    net.register_forward_pre_hook(observe)
    node = NeuralODE(net, step_size=1 / STEPS, trajectory=trajectory, **control)
    return gradient_of(node, spoil), node


def gradient_of(node: NeuralODE, spoil: Callable[[NeuralODE], None] = lambda node: None) -> torch.Tensor:
    """The gradient of one more solve, always the same one."""
    torch.manual_seed(4)
    u0 = torch.randn(4096, 4, dtype=torch.float64, requires_grad=True)
    loss = node(u0, [0.0, 1.0])[-1].square().sum()
    spoil(node)
    gradients = torch.autograd.grad(loss, [u0, *node.parameters()])
    return torch.cat([value.reshape(-1) for value in gradients])


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


def slot_file(node: NeuralODE) -> Any:
    """The file of a module's only solver, once all that was to be written is."""
    (solver,) = node._solvers._solvers.values()
    file = solver.pools[Tier.DISK]._file
    with file.changed:
        assert file.changed.wait_for(lambda: not any(slot.busy for slot in file.slots), timeout=PATIENCE)
    return file


def flip_a_byte(node: NeuralODE) -> None:
    """Damage the first slot behind the program's back, once it is on disk."""
    file = slot_file(node)
    file.open().flush()
    chunk = file.open()["state"].id.get_chunk_info(0)
    with Path(file.open().filename).open("r+b") as raw:
        raw.seek(chunk.byte_offset + 1000)
        byte = raw.read(1)[0]
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 1]))


def lose_the_file(node: NeuralODE) -> None:
    """Take the directory away and the open file too, as with a file system that is no longer there."""
    file = slot_file(node).open()
    shutil.rmtree(Path(file.filename).parent)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, file.id.get_vfd_handle())
    os.close(nothing)


def remove_at(evaluation: int, directory: Path) -> Callable[..., None]:
    """What removes a directory before so many evaluations of f."""
    evaluations = itertools.count(1)

    def observe(*_: object) -> None:
        if next(evaluations) == evaluation:
            shutil.rmtree(directory)

    return observe


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gradient_of(node), expected)
    assert node.last_solve.bytes_written == 0


@pytest.mark.parametrize("ram_slots", [0, 2])
def test_a_flipped_byte_is_noticed_and_costs_only_steps(ram_slots: int, tmp_path: Path, expected: torch.Tensor) -> None:
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=4, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"slot 0 is damaged: its checksum is wrong; going on without"):
        gradient, _ = solve_and_differentiate(trajectory, flip_a_byte)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("ram_slots", [0, 1, 3])
@pytest.mark.parametrize("fault", ["a flipped byte", "a lost file", "a full disk"])
def test_with_error_control_a_disk_that_fails_changes_no_bit_of_the_gradient(
    fault: str, ram_slots: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Its backward pass may begin with a checkpoint from disk, before any step is reversed."""
    control = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-11}
    exact, ample = solve_and_differentiate(Trajectory(keep="solution"), **control)
    assert ample.last_solve.forward_steps > 10
    directory, slots, spoil = tmp_path, 3, {"a flipped byte": flip_a_byte, "a lost file": lose_the_file}.get(fault)
    if spoil is None:
        directory, slots = request.getfixturevalue("small_disk"), 9
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=slots, directory=directory)
    with pytest.warns(RuntimeWarning, match="going on without checkpoints on disk") as warned:
        gradient, node = solve_and_differentiate(trajectory, spoil or (lambda node: None), **control)
    assert len(warned) == 1
    assert torch.equal(gradient, exact)
    assert node.last_solve.adjoint_steps == node.last_solve.forward_steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gradient_of(node), exact)
    assert node.last_solve.bytes_written == 0


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


@pytest.mark.parametrize("policy", ["recompute", "raise"])
@pytest.mark.parametrize("evaluation", [40, 97, 200])
def test_a_scratch_directory_that_is_removed_while_its_file_is_open_loses_nothing(
    policy: str, evaluation: int, tmp_path: Path, expected: torch.Tensor
) -> None:
    """Removed between two writes of the forward pass, after it, and between two writes of the backward pass."""
    place = tmp_path / "scratch"
    place.mkdir()
    trajectory = Trajectory(ram_slots=0, disk_slots=4, directory=place, on_spill_error=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient, node = solve_and_differentiate(trajectory, observe=remove_at(evaluation, place))
        assert not place.exists()
        assert torch.equal(gradient, expected)
        place.mkdir()
        assert torch.equal(gradient_of(node), expected)
        assert node.last_solve.bytes_read > 0


@pytest.mark.parametrize("ram_slots", [0, 2])
def test_a_file_system_that_vanishes_costs_steps_and_one_warning(
    ram_slots: int, tmp_path: Path, expected: torch.Tensor
) -> None:
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=4, directory=tmp_path)
    with pytest.warns(RuntimeWarning, match="going on without checkpoints on disk") as warned:
        gradient, node = solve_and_differentiate(trajectory, lose_the_file)
    assert len(warned) == 1
    assert torch.equal(gradient, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gradient_of(node), expected)
    assert node.last_solve.bytes_written == 0


def test_a_lost_file_system_ends_the_solve_on_request_and_the_next_makes_a_new_file(
    tmp_path: Path, expected: torch.Tensor
) -> None:
    trajectory = Trajectory(ram_slots=0, disk_slots=4, directory=tmp_path, on_spill_error="raise")
    torch.manual_seed(3)
    node = NeuralODE(Net(), step_size=1 / STEPS, trajectory=trajectory)
    with pytest.raises(SpillError, match=r"trajectory: rank 0: slot \d+ is damaged: its checksum is wrong"):
        gradient_of(node, lose_the_file)
    gc.collect()
    assert torch.equal(gradient_of(node), expected)
    assert node.last_solve.bytes_read > 0


def test_a_scratch_directory_that_is_removed_before_the_first_write_costs_only_steps(
    tmp_path: Path, expected: torch.Tensor
) -> None:
    place = tmp_path / "scratch"
    place.mkdir()
    # Without numbers of slots the first step is run, and measured, before its state is stored.
    trajectory = Trajectory(ram="128KiB", disk="512KiB", schedule="multistage", directory=place)
    with pytest.warns(RuntimeWarning, match="could not be written: No such file or directory; going on") as warned:
        gradient, _ = solve_and_differentiate(trajectory, observe=remove_at(1, place))
    assert len(warned) == 1
    assert torch.equal(gradient, expected)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="on_spill_error = 'ignore': must be one of recompute, raise"):
        Trajectory(on_spill_error="ignore")


SPILLING = """
import sys, time
from pathlib import Path
import torch
from pnode_dist import NeuralODE, Trajectory
from pnode_dist.checkpointing.schedule import Tier

directory = Path(sys.argv[1])
node = NeuralODE(lambda t, u: -u, step_size=0.05, trajectory=Trajectory(ram_slots=1, disk_slots=3, directory=directory))
solution = node(torch.ones(3, dtype=torch.float64, requires_grad=True), [0.0, 1.0])

def wait(gradient):
    (solver,) = node._solvers._solvers.values()
    solver.pools[Tier.DISK]._file.finish()
    print("in the backward pass", flush=True)
    time.sleep(600)

solution.register_hook(wait)
solution.sum().backward()
"""


def spilling_process(directory: Path) -> subprocess.Popen[str]:
    """A process in the middle of a backward pass, with all its checkpoints on disk."""
    process = subprocess.Popen([sys.executable, "-c", SPILLING, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in the backward pass\n"
    assert list(directory.rglob("*.h5"))
    return process


@pytest.mark.slow
def test_sigterm_in_the_backward_pass_ends_the_process_and_leaves_no_file(tmp_path: Path) -> None:
    process = spilling_process(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


BUSY = """
import sys, time
from pathlib import Path
import torch
from pnode_dist import NeuralODE, Trajectory

steps = 0

class Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return -u

    @staticmethod
    def backward(ctx, gradient):
        global steps
        steps += 1
        print("in an adjoint step", flush=True)
        # The disk gets on meanwhile; then there is time for the signal.
        time.sleep(0.02 if steps < int(sys.argv[2]) else 1.0)
        return -gradient

trajectory = Trajectory(ram_slots=0, disk_slots=3, directory=Path(sys.argv[1]))
node = NeuralODE(lambda t, u: Decay.apply(u), step_size=0.01, trajectory=trajectory)
node(torch.ones(2**16, dtype=torch.float64, requires_grad=True), [0.0, 1.0]).sum().backward()
"""


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.slow
def test_sigterm_between_adjoint_steps_with_the_disk_at_work_leaves_nothing(tmp_path: Path, steps: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(tmp_path), str(steps)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(steps):
        assert process.stdout.readline() == "in an adjoint step\n"
    assert list(tmp_path.rglob("*.h5"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


ON_TWO_RANKS = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from pnode_dist import Mesh, NeuralODE, Trajectory
from pnode_dist.system import scratch

with Mesh() as mesh:
    place = Path(sys.argv[1])
    own, other = place / f"rank{mesh.rank}", place / f"rank{1 - mesh.rank}"
    own.mkdir()
    trajectory = Trajectory(ram_slots=1, disk_slots=3, directory=own)
    node = NeuralODE(lambda t, u: -u, step_size=0.05, trajectory=trajectory)
    solution = node(torch.ones(3, dtype=torch.float64, requires_grad=True), [0.0, 1.0])

    tidy_up = signal.getsignal(signal.SIGTERM)

    def later(number, frame):
        # As when the signal finds a rank in a long call: a little after the other one has done with it.
        while list(other.iterdir()):
            time.sleep(0.01)
        tidy_up(number, frame)

    def wait_for_others(seconds):
        # As long as the other one takes here, whatever the machine has to do.
        assert seconds >= 1
        while list(other.iterdir()):
            time.sleep(0.01)

    scratch.time = SimpleNamespace(sleep=wait_for_others)

    if mesh.rank == 1:
        signal.signal(signal.SIGTERM, later)

    def wait(gradient):
        mesh.barrier()
        (place / f"pid{mesh.rank}.tmp").write_text(str(os.getpid()))
        (place / f"pid{mesh.rank}.tmp").rename(place / f"pid{mesh.rank}")
        time.sleep(600)

    solution.register_hook(wait)
    solution.sum().backward()
"""


@pytest.mark.slow
def test_sigterm_to_all_ranks_leaves_nothing_of_any_though_one_is_busy_for_a_moment(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ON_TWO_RANKS)
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [str(root / "launch" / "mpirun.sh"), "-n", "2", sys.executable, str(program), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        until = time.monotonic() + PATIENCE
        while not all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        assert all(list((tmp_path / f"rank{rank}").rglob("*.h5")) for rank in (0, 1))
        for rank in (0, 1):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) != 0
    finally:
        process.kill()
    assert [list((tmp_path / f"rank{rank}").iterdir()) for rank in (0, 1)] == [[], []]


@pytest.mark.slow
def test_the_file_that_a_killed_process_leaves_can_be_read(tmp_path: Path) -> None:
    process = spilling_process(tmp_path)
    process.kill()
    process.wait(timeout=PATIENCE)
    (path,) = tmp_path.rglob("*.h5")
    with h5py.File(path, "r") as file:
        assert file.attrs["pid"] == process.pid
        used = file["label"]["step"] >= 0
        assert used.any()
        for state, label in zip(file["state"][used], file["label"][used], strict=True):
            assert zlib.crc32(state.data) == label["crc32"]


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next_and_a_living_one_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_GRACE", 0.0)
    living, killed = spilling_process(tmp_path), spilling_process(tmp_path)
    try:
        killed.kill()
        killed.wait(timeout=PATIENCE)
        assert len(list(tmp_path.iterdir())) == 2
        time.sleep(0.01)
        directory = scratch.PrivateDirectory(tmp_path)
        remaining = [path for path in tmp_path.iterdir() if path != directory.path]
        assert len(remaining) == 1
        assert list(remaining[0].glob("*.h5"))
        directory.remove()
    finally:
        living.terminate()
        living.wait(timeout=PATIENCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ram_slots", [0, 2])
def test_a_directory_that_is_gone_before_the_next_solve_costs_steps_and_one_warning(
    ram_slots: int, tmp_path: Path, expected: torch.Tensor
) -> None:
    directory = tmp_path / "scratch"
    directory.mkdir()
    trajectory = Trajectory(ram_slots=ram_slots, disk_slots=4, directory=directory)
    gradient, node = solve_and_differentiate(trajectory)
    assert torch.equal(gradient, expected)
    shutil.rmtree(directory)
    with pytest.warns(RuntimeWarning, match=r"every rank can write; rank 0 \(.*\) cannot; going on without") as seen:
        assert torch.equal(gradient_of(node), expected)
    assert len(seen) == 1
    assert node.last_solve.bytes_written == 0
