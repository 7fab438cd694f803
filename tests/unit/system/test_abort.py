"""What a rank said before it ends all ranks arrives, and what it kept on disk goes."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from pnode_dist.system.abort import unread_bytes
from tests.conftest import PATIENCE, ROOT


def test_a_pipe_tells_what_has_not_been_read_from_it() -> None:
    reader, writer = os.pipe()
    try:
        assert unread_bytes(writer) == 0
        os.write(writer, b"last words")
        assert unread_bytes(writer) == 10
        os.read(reader, 4)
        assert unread_bytes(writer) == 6
        os.read(reader, 6)
        assert unread_bytes(writer) == 0
    finally:
        os.close(reader)
        os.close(writer)


def test_a_socket_tells_whether_the_other_end_has_read_everything() -> None:
    here, there = socket.socketpair()
    with here, there:
        # What is there to be read at this end says nothing.
        there.sendall(b"question")
        assert unread_bytes(here.fileno()) == 0
        here.sendall(b"answer")
        assert unread_bytes(here.fileno()) > 0
        there.recv(6)
        assert unread_bytes(here.fileno()) == 0


def test_a_file_and_what_is_closed_are_not_waited_for(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        log.write("last words")
        log.flush()
        log.seek(0)
        number = log.fileno()
        assert unread_bytes(number) == 0
    assert unread_bytes(number) == 0


LAST_WORDS = """
import os, sys, time
from pathlib import Path
from pnode_dist.system.abort import deliver_output

print("out")
sys.stderr.write("err")
began = time.monotonic()
arrived = deliver_output(patience=float(sys.argv[2]))
Path(sys.argv[1]).write_text(f"{arrived} {time.monotonic() - began}")
os._exit(0)
"""


def with_last_words(told: Path, patience: float) -> subprocess.Popen[bytes]:
    """A process that has written to its pipes and waits until that has been read."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAST_WORDS, str(told), str(patience)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        until = time.monotonic() + PATIENCE
        while not int.from_bytes(fcntl.ioctl(stream, termios.FIONREAD, bytes(4)), sys.byteorder):
            assert time.monotonic() < until
            time.sleep(0.01)
    return process


@pytest.mark.parametrize("last", ["stdout", "stderr"])
def test_a_process_waits_until_both_of_its_streams_have_been_read(last: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    process = with_last_words(told, patience=PATIENCE)
    first = "stderr" if last == "stdout" else "stdout"
    expected = {"stdout": b"out\n", "stderr": b"err"}
    assert os.read(getattr(process, first).fileno(), 100) == expected[first]
    time.sleep(0.5)
    assert not told.exists()
    assert os.read(getattr(process, last).fileno(), 100) == expected[last]
    process.communicate(timeout=PATIENCE)
    arrived, seconds = told.read_text().split()
    assert arrived == "True"
    assert float(seconds) >= 0.5


def test_a_process_does_not_wait_for_ever_for_one_that_does_not_read(tmp_path: Path) -> None:
    told = tmp_path / "told"
    process = with_last_words(told, patience=0.3)
    process.wait(timeout=PATIENCE)
    arrived, seconds = told.read_text().split()
    assert arrived == "False"
    assert float(seconds) >= 0.3
    process.communicate()


# As MPI does where the network has gone: it does not come back, and keeps the interpreter from all other threads.
STUCK = """
import ctypes
from pnode_dist.system import abort

class Stuck:
    def Abort(self, code):
        ctypes.PyDLL(None).sleep(100_000)

abort._ABORTING = 0.5
abort.abort(7, Stuck())
"""


def test_a_process_ends_although_mpi_cannot_end_the_others() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STUCK],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == b""


# The launcher of the ranks, which is the parent of one, is stopped before the rank writes and goes on a little later.
BUSY_LAUNCHER = """
import os, signal, subprocess, sys
from pnode_dist import Mesh
from pnode_dist.system import abort

# For that launcher, which goes on when the machine lets it.
abort.deliver_output.__defaults__ = (300.0,)

def stop_the_launcher():
    launcher = os.getppid()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {launcher}"], **silent)
    os.kill(launcher, signal.SIGSTOP)
    sys.stdout.write("so much to say\\n" * 2000)

with Mesh() as mesh:
    if mesh.rank == 1:
        stop_the_launcher()
        ENDING
    mesh.barrier()
"""

ENDINGS = {"exiting": "sys.exit('no ocean today')", "raising": "raise RuntimeError('no ocean today')"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_message_arrives_although_the_launcher_is_busy(ending, mpirun, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(BUSY_LAUNCHER.replace("ENDING", ENDINGS[ending]))
    ended = mpirun(2, sys.executable, str(program), PYTHONPATH=str(ROOT))
    assert ended.returncode == 1
    assert "no ocean today" in ended.stderr
    whole = ended.stdout.count("so much to say\n")
    # Open MPI's launcher then writes a piece of the last line to the other stream.
    assert whole == 2000 or (whole == 1999 and MPI.get_vendor()[0] == "Open MPI")


SPILLING = """
import sys
from pathlib import Path
import torch
from pnode_dist import Mesh, NeuralODE, Trajectory

with Mesh() as mesh:
    place = Path(sys.argv[1]) / f"rank{mesh.rank}"
    place.mkdir()
    trajectory = Trajectory(ram_slots=1, disk_slots=3, directory=place)
    node = NeuralODE(lambda t, u: -u, step_size=0.05, trajectory=trajectory)
    solution = node(torch.ones(3, dtype=torch.float64, requires_grad=True), [0.0, 1.0])
    assert list(place.rglob("*.h5"))
    mesh.barrier()
    if mesh.rank == 1:
        raise RuntimeError("no ocean today")
    mesh.barrier()
"""


def test_a_rank_that_ends_all_leaves_no_checkpoints_behind(mpirun, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SPILLING)
    ended = mpirun(2, sys.executable, str(program), str(tmp_path), PYTHONPATH=str(ROOT))
    assert ended.returncode == 1
    assert "no ocean today" in ended.stderr
    assert list((tmp_path / "rank1").iterdir()) == []
