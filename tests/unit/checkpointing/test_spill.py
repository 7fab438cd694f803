"""Checkpoints on disk: HDF5 that others can read, private while it is there, and gone afterwards."""

import gc
import json
import os
import socket
import stat
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import pnode_dist
from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.checkpointing import spill
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.spill import SpillPool
from pnode_dist.checkpointing.store import SpillError
from tests.conftest import PATIENCE
from tests.oracles.right_hand_sides import Network, random

TIMES, U0 = [0.0, 1.0], random(2, 3)


@pytest.fixture
def spilling(tmp_path: Path) -> Trajectory:
    return Trajectory(ram_slots=1, disk_slots=3, directory=tmp_path)


def wait_until_written(node: NeuralODE) -> None:
    """Until the thread that writes in the background has nothing left to do."""
    (solver,) = node._solvers._solvers.values()
    wait_for(solver.pools[Tier.DISK])


def wait_for(pool: Any) -> None:
    file = pool._file
    with file.changed:
        assert file.changed.wait_for(lambda: not any(slot.busy for slot in file.slots), timeout=PATIENCE)


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_a_file_holds_the_states_before_the_steps_it_names(tmp_path: Path, spilling: Trajectory) -> None:
    network = Network()
    # Steps of a power of two: their ends are the same numbers whichever way they are reached.
    states = odeint(network, U0, np.linspace(0, 1, 17).tolist()).detach()
    node = NeuralODE(network, step_size=0.0625, trajectory=spilling)
    solution = node(U0, TIMES)
    wait_until_written(node)
    (path,) = files(tmp_path)
    with h5py.File(path, "r", locking=False) as file:
        labels = file["label"][...]
        assert np.all(labels["step"][3:] == -1)
        assert len(set(labels["step"][:3])) == 3
        assert file["state"].dtype == np.float64
        for label, state in zip(labels[:3], file["state"], strict=False):
            assert label["time"] == label["step"] * 0.0625
            assert np.array_equal(state.reshape(2, 3), states[label["step"]].numpy())
    assert node.last_solve.bytes_written == 3 * 48
    solution.sum().backward()


@pytest.mark.parametrize("shapes", [((2, 3),), ((2,), (), (1, 3))], ids=["one part", "three parts"])
def test_a_file_says_what_shapes_the_parts_of_a_row_have(shapes: tuple[tuple[int, ...], ...], tmp_path: Path) -> None:
    pool = SpillPool(6, np.dtype("float64"), tmp_path, 0, shapes)
    slot = pool.acquire()
    pool.write(slot, np.arange(6.0), 0, 0.0)
    wait_for(pool)
    (path,) = files(tmp_path)
    with h5py.File(path, "r", locking=False) as file:
        attributes = file["state"].attrs
        assert tuple(tuple(attributes[f"shape{k}"].tolist()) for k in range(len(attributes))) == shapes


@pytest.mark.parametrize("stage", ["write", "fetch"])
def test_an_error_in_the_background_is_raised_at_the_next_read_without_a_wait(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> int:
        raise MemoryError("no memory left")

    pool = SpillPool(6, np.dtype("float64"), tmp_path, 0)
    slot = pool.acquire()
    if stage == "write":
        monkeypatch.setattr(spill.isal_zlib, "crc32", no_memory)
    pool.write(slot, np.arange(6.0), 7, 0.0)
    wait_for(pool)
    monkeypatch.setattr(spill.isal_zlib, "crc32", no_memory)
    with pytest.raises(SpillError, match="no memory left"):
        pool.read(slot, np.empty(6))


READING = """
import json, sys
import h5py

with h5py.File(sys.argv[1], "r", locking=False) as file:
    used = file["label"]["step"] >= 0
    steps = file["label"]["step"][used].tolist()
    slots = {k: {"dtype": str(file["state"].dtype), "step": step} for k, step in enumerate(steps)}
    values = dict(enumerate(file["state"][used].tolist()))
    attributes = {name: value if isinstance(value, str) else int(value) for name, value in file.attrs.items()}
print(json.dumps([attributes, slots, values]))
"""


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_another_process_can_read_the_file_meanwhile_and_learns_where_it_is_from(tmp_path: Path, dtype: str) -> None:
    trajectory = Trajectory(ram_slots=1, disk_slots=3, directory=tmp_path, checkpoint_dtype=dtype)
    network = Network()
    states = odeint(network, U0, np.linspace(0, 1, 17).tolist()).detach()
    node = NeuralODE(network, step_size=0.0625, trajectory=trajectory)
    began = datetime.now(UTC).replace(microsecond=0)
    solution = node(U0, TIMES)
    wait_until_written(node)
    (path,) = files(tmp_path)
    read = subprocess.run(
        [sys.executable, "-c", READING, path], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert read.returncode == 0, read.stderr
    attributes, slots, values = json.loads(read.stdout)
    assert attributes["rank"] == 0
    assert attributes["host"] == socket.gethostname()
    assert attributes["pid"] == os.getpid()
    assert attributes["program"] == f"pnode_dist {pnode_dist.__version__}"
    assert began <= datetime.fromisoformat(attributes["created"]) <= datetime.now(UTC)
    assert uuid.UUID(attributes["run_id"]).version == 4
    assert sorted(slots) == ["0", "1", "2"]
    for name, slot in slots.items():
        assert slot["dtype"] == dtype
        assert np.array_equal(values[name], states[slot["step"]].numpy().astype(dtype).ravel())
    solution.sum().backward()


def test_the_files_of_a_process_carry_one_run_id_that_differs_between_processes(
    tmp_path: Path, spilling: Trajectory
) -> None:
    nodes = [NeuralODE(Network(), step_size=0.05, trajectory=spilling) for _ in range(2)]
    solutions = [node(U0, TIMES) for node in nodes]
    run_ids = []
    for path in files(tmp_path):
        with h5py.File(path, "r", locking=False) as file:
            run_ids.append(file.attrs["run_id"])
    assert len(run_ids) == 2
    assert len(set(run_ids)) == 1
    script = "import os; from pnode_dist.checkpointing.spill import _run_id; print(_run_id(os.getpid()))"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert other.stdout.strip() not in run_ids
    del solutions


def test_files_are_private_whatever_the_umask(tmp_path: Path, spilling: Trajectory) -> None:
    before = os.umask(0)
    try:
        solution = odeint(Network(), U0, TIMES, step_size=0.05, trajectory=spilling)
    finally:
        os.umask(before)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.parent.parent == tmp_path
    del solution


@pytest.mark.parametrize("backward", [False, True])
def test_files_are_gone_when_the_solution_is(backward: bool, tmp_path: Path, spilling: Trajectory) -> None:
    network = Network()
    solution = odeint(network, U0, TIMES, step_size=0.05, trajectory=spilling)
    assert files(tmp_path)
    if backward:
        solution.sum().backward()
    del solution
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_module_keeps_one_file_between_solves_and_removes_it_with_itself(
    tmp_path: Path, spilling: Trajectory
) -> None:
    node = NeuralODE(Network(), step_size=0.05, trajectory=spilling)
    for _ in range(3):
        node(U0, TIMES).sum().backward()
        assert len(files(tmp_path)) == 1
    (path,) = files(tmp_path)
    with h5py.File(path, "r", locking=False) as file:
        assert np.count_nonzero(file["label"]["step"] >= 0) == 3
    del node
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_pool_that_its_own_thread_collects_as_garbage_goes_without_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    pool = SpillPool(6, np.dtype("float64"), tmp_path, 0)
    pool.write(pool.acquire(), np.arange(6.0), 0, 0.0)
    wait_for(pool)
    assert files(tmp_path)
    thread, submit = pool._file._thread, pool._file.submit
    pool.itself = pool  # type: ignore[attr-defined]
    del pool
    submit(gc.collect)
    del submit
    assert thread is not None
    thread.join(timeout=PATIENCE)
    assert not thread.is_alive()
    assert [complaint.exc_value for complaint in complaints] == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_while_memory_suffices(tmp_path: Path) -> None:
    node = NeuralODE(Network(), step_size=0.05, trajectory=Trajectory(disk="1GiB", directory=tmp_path))
    node(U0, TIMES).sum().backward()
    assert list(tmp_path.iterdir()) == []
    assert (node.last_solve.bytes_written, node.last_solve.bytes_read) == (0, 0)


def test_nothing_is_written_without_gradients(tmp_path: Path, spilling: Trajectory) -> None:
    with torch.no_grad():
        odeint(Network(), U0, TIMES, step_size=0.05, trajectory=spilling)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_func_leaves_no_file(tmp_path: Path, spilling: Trajectory) -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if float(t) > 0.8:
            raise FloatingPointError("blew up")
        return -u

    with pytest.raises(FloatingPointError, match="blew up"):
        odeint(func, U0.clone().requires_grad_(), TIMES, step_size=0.05, trajectory=spilling)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_petsc_writes_no_trajectory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spilling: Trajectory
) -> None:
    elsewhere = tmp_path / "working directory"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    odeint(Network(), U0, TIMES, step_size=0.05).sum().backward()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise RuntimeError('the end')"])
@pytest.mark.slow
def test_files_are_gone_when_the_process_ends(ending: str, tmp_path: Path) -> None:
    script = f"""
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
import torch
from pnode_dist import NeuralODE, Trajectory
trajectory = Trajectory(ram_slots=1, disk_slots=3, directory={str(tmp_path)!r})
node = NeuralODE(lambda t, u: -u, step_size=0.05, trajectory=trajectory)
solution = node(torch.ones(3, dtype=torch.float64, requires_grad=True), [0.0, 1.0])
assert list(Path({str(tmp_path)!r}).rglob("*.h5"))
print("spilled")
{ending}
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.stdout == "spilled\n", ended.stderr
    assert ended.returncode == {"pass": 0, "sys.exit(3)": 3}.get(ending, 1), ended.stderr
    assert list(tmp_path.iterdir()) == []


STILL_WRITING = """
import atexit, sys, threading, time, weakref
from pathlib import Path
import numpy as np

# Handlers run in reverse order: all finalizers after h5py's own, as where torch made the first; this just before it.
weakref.finalize(Path, lambda: None)
import h5py
atexit.register(lambda: print(pool._file.slots[slot].phase.value))

from pnode_dist.checkpointing.spill import SpillPool

pool = SpillPool(6, np.dtype("float64"), Path(sys.argv[1]), 0)
pool._file.start()
ending = threading.Event()
# The thread is at work until the interpreter ends, and for a moment longer.
pool._file.submit(lambda: (ending.wait(), time.sleep(0.5)))
atexit.register(ending.set)
slot = pool.acquire()
pool.write(slot, np.arange(6.0), 0, 0.0)
print(pool._file.slots[slot].phase.value)
"""


def test_all_is_written_before_h5py_ends_which_does_not_take_the_library_s_lock(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STILL_WRITING, tmp_path], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.stdout == "writing\non disk\n", ended.stderr
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []
