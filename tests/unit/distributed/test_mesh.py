"""The mesh of one process, and how a failure of one rank among two ends both."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pnode_dist import ConfigurationError, Mesh
from tests.conftest import PATIENCE


def launched(script: str, directory: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks, in an environment that knows of no other MPI job. Fails when it hangs."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert mpiexec, "mpiexec is needed to test failures: it is neither beside python nor on PATH"
    path = directory / "script.py"
    path.write_text(script)
    environment = {
        name: value
        for name, value in os.environ.items()
        # The networks that Open MPI may use are those of the machine.
        if not name.startswith(("PMI", "HYDRA", "OMPI", "MPI")) or name == "OMPI_MCA_btl"
    }
    root = Path(__file__).parents[3]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    # Open MPI refuses to run as root, and on fewer cores than ranks, without these.
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [mpiexec, "-n", str(ranks), sys.executable, str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False, cwd=directory
    )


PREAMBLE = """
import sys, threading, time
import torch
from mpi4py import MPI
from pnode_dist import BatchPartition, Mesh, NeuralODE, odeint
from pnode_dist.exchange import global_sum

class Tripwire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        if MPI.COMM_WORLD.rank == 1:
            raise RuntimeError("boom in backward")
        return cotangent

def solve(mesh, in_func=False, in_backward=False):
    partition = BatchPartition(mesh, 4, (3,))
    def func(t, u):
        if in_func and mesh.rank == 1 and float(t) > 0.5:
            raise RuntimeError("boom in func")
        mean = global_sum(u.sum(0), partition.comm) / 4
        return Tripwire.apply(mean - u) if in_backward else mean - u
    u0 = torch.ones(partition.local_shape, dtype=torch.float64, requires_grad=True)
    odeint(func, u0, [0.0, 1.0], step_size=0.1, partition=partition).sum().backward()
"""

FAILURES = {
    "on rank 0": (
        "    if mesh.rank == 0:\n        raise RuntimeError('boom at the root')\n    solve(mesh)",
        "boom at the root",
    ),
    "inside func": ("    solve(mesh, in_func=True)", "boom in func"),
    "inside backward": ("    solve(mesh, in_backward=True)", "boom in backward"),
    "in a thread": (
        "    def fail():\n        raise RuntimeError('boom in a thread')\n"
        "    if mesh.rank == 1:\n        threading.Thread(target=fail).start()\n        time.sleep(100_000)\n"
        "    mesh.barrier()",
        "boom in a thread",
    ),
    "while the other waits for a sum": (
        "    if mesh.rank == 1:\n        raise RuntimeError('boom alone')\n    mesh.sum(torch.ones(3))",
        "boom alone",
    ),
}


@pytest.mark.parametrize(
    ("where", "backend"),
    [
        # Through the hooks of the interpreter, of autograd and of threads; the other ways lead through the first.
        ("on rank 0", "mpi"),
        ("inside backward", "mpi"),
        ("in a thread", "mpi"),
        ("while the other waits for a sum", "gloo"),
        pytest.param("inside func", "mpi", marks=pytest.mark.nightly),
        pytest.param("while the other waits for a sum", "mpi", marks=pytest.mark.nightly),
    ],
)
def test_one_rank_raising_ends_all_with_its_traceback(where: str, backend: str, tmp_path: Path) -> None:
    body, message = FAILURES[where]
    ended = launched(f"{PREAMBLE}\nwith Mesh(backend={backend!r}) as mesh:\n{body}\n", tmp_path)
    assert ended.returncode != 0
    rank = 0 if where == "on rank 0" else 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith(f"[rank {rank} on ")]
    assert any("Traceback" in line for line in lines), ended.stderr
    assert lines[-1].endswith(f"RuntimeError: {message}")
    assert any("script.py" in line for line in lines)
    assert not any(line.startswith(f"[rank {1 - rank} on ") for line in ended.stderr.splitlines())


def test_a_mesh_without_a_with_block_ends_all_too(tmp_path: Path) -> None:
    body = "mesh = Mesh()\nif mesh.rank == 1:\n    raise RuntimeError('boom outside')\nsolve(mesh)\n"
    ended = launched(PREAMBLE + body, tmp_path)
    assert ended.returncode != 0
    assert "RuntimeError: boom outside" in ended.stderr


def test_one_rank_exiting_ends_all_with_its_code(tmp_path: Path) -> None:
    body = "with Mesh() as mesh:\n    if mesh.rank == 1:\n        sys.exit(3)\n    solve(mesh)\n"
    ended = launched(PREAMBLE + body, tmp_path)
    assert ended.returncode == 3


def test_one_rank_exiting_with_a_message_ends_all_and_prints_it(tmp_path: Path) -> None:
    body = "with Mesh() as mesh:\n    if mesh.rank == 1:\n        sys.exit('no ocean today')\n    solve(mesh)\n"
    ended = launched(PREAMBLE + body, tmp_path)
    assert ended.returncode == 1
    assert "no ocean today" in ended.stderr


def test_all_ranks_exiting_with_a_code_end_with_it(tmp_path: Path) -> None:
    ended = launched(f"{PREAMBLE}\nwith Mesh() as mesh:\n    solve(mesh)\n    sys.exit(2)\n", tmp_path)
    assert ended.returncode == 2


def test_an_exception_that_is_caught_ends_nothing(tmp_path: Path) -> None:
    body = """
with Mesh() as mesh:
    try:
        solve(mesh, in_func=False)
        raise KeyError("only a try")
    except KeyError:
        pass
    solve(mesh)
    total = mesh.sum(torch.ones(1)).item()
sys.stdout.write(f"fine {total}\\n")
"""
    ended = launched(PREAMBLE + body, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["fine 2.0"] * 2
    assert ended.stderr == ""


LISTENING = """
import os
from pathlib import Path
from mpi4py import MPI
import torch
from pnode_dist import Mesh

def listening():
    # Addresses as /proc has them, in hexadecimal: 0100007F is 127.0.0.1.
    own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own}

MPI.COMM_WORLD.Barrier()
before = listening()
with Mesh(backend="BACKEND") as mesh:
    mesh.sum(torch.ones(1))
    opened = listening() - before
    found = mesh.gather_object(sorted({address.partition(":")[0] for address in opened}))
    if mesh.is_root:
        print(*sorted(set().union(*map(set, found))))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells by /proc who listens")
@pytest.mark.parametrize(("backend", "addresses"), [("mpi", ""), ("gloo", "0100007F")], ids=["by MPI", "by gloo"])
def test_ranks_of_one_machine_listen_on_loopback_alone_and_nowhere_with_mpi(
    backend: str, addresses: str, tmp_path: Path
) -> None:
    ended = launched(LISTENING.replace("BACKEND", backend), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == addresses


# pytest-mpi would skip a test whose own name is "mpi".
@pytest.mark.parametrize("backend", [None, "mpi", "gloo"], ids=lambda backend: f"backend {backend}")
def test_one_process_without_a_launcher_is_a_mesh_of_one(backend: str | None) -> None:
    with Mesh(backend=backend) as mesh:
        assert (mesh.rank, mesh.size, mesh.state_ranks, mesh.data_replicas) == (0, 1, 1, 1)
        assert mesh.is_root
        assert torch.equal(mesh.sum(torch.arange(3)), torch.arange(3))
        assert mesh.broadcast_object("word") == "word"
        mesh.barrier()
    assert not dist.is_initialized()


def test_an_exception_leaves_a_mesh_of_one_closed_and_goes_on() -> None:
    with pytest.raises(KeyError, match="mine"), Mesh():
        raise KeyError("mine")
    assert not dist.is_initialized()
    with Mesh() as mesh:
        assert mesh.size == 1


def test_a_process_group_that_was_there_before_is_used_and_left_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Mesh(backend="gloo") as mesh:
            assert mesh.sum(torch.ones(1)).item() == 1
        assert dist.is_initialized()
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_mesh_prints_what_it_is() -> None:
    with Mesh() as mesh:
        assert repr(mesh) == "Mesh(state=1, data=1, backend='mpi', rank=0)"


def test_processes_that_srun_started_without_mpi_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PMI_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(
        ConfigurationError, match=r"srun started 4 tasks but .* connects only 1: start with launch/srun\.sh"
    ):
        Mesh()


def by_torchrun(script: str, directory: Path, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run a script in so many processes that torchrun's variables describe and MPI does not connect."""
    path = directory / "script.py"
    path.write_text(script)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).parents[3])
    processes = [
        subprocess.Popen(
            [sys.executable, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": root,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]
    ended = []
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def test_torchrun_s_processes_are_data_replicas(tmp_path: Path) -> None:
    script = """
import torch
from pnode_dist import Mesh
with Mesh(state=1, data=2, backend="gloo") as mesh:
    total = mesh.sum(torch.tensor([1.0 + mesh.rank]), over="data").item()
    print(mesh.rank, mesh.size, mesh.replica, mesh.state_comm.size, total)
"""
    ended = by_torchrun(script, tmp_path)
    assert [process.stdout for process in ended] == ["0 2 0 1 3.0\n", "1 2 1 1 3.0\n"], ended[0].stderr


def test_torchrun_s_processes_cannot_share_a_state(tmp_path: Path) -> None:
    ended = by_torchrun("from pnode_dist import Mesh\nMesh(state=2)\n", tmp_path)
    for process in ended:
        assert process.returncode == 1
        assert "torchrun started 2 processes that MPI does not connect" in process.stderr
