"""One rank of a node compiles, and the others find the result in the cache."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.exchange import global_sum, halo
from pnode_dist.system.compile_order import compile_in_turn, rehearsal
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.grids import block
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi


@pytest.mark.nightly
@pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges")
def test_other_ranks_find_what_the_first_has_compiled(
    mesh: Mesh, comm: MPI.Comm, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))
    partition = GridPartition(mesh, (4 * mesh.size, 5), boundary="periodic", processes=(mesh.size, 1))
    u = block(partition, random(*partition.global_shape)).clone().requires_grad_()

    def function(u: torch.Tensor) -> torch.Tensor:
        return halo(torch.tanh(halo(u.sin(), partition)[1:-1, 1:-1] * u), partition).sin()

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    compile_in_turn(lambda: torch.autograd.grad(compiled(u).sum(), u), comm)
    hits, misses = (counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss"))
    # One graph forward, one backward.
    assert (hits, misses) == ((0, 2) if comm.rank == 0 else (2, 0))
    (found,) = torch.autograd.grad(compiled(u).sum(), u)
    (wanted,) = torch.autograd.grad(function(u).sum(), u)
    assert distance(found, wanted) <= 1e-12
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("failing", ["first", "last"])
def test_an_error_of_the_compiling_rank_reaches_all(failing: str, comm: MPI.Comm) -> None:
    culprit = 0 if failing == "first" else comm.size - 1

    def call() -> None:
        if comm.rank == culprit:
            raise ValueError("no such operation")

    own = comm.rank == culprit
    kind, message = (ValueError, "^no such") if own else (RuntimeError, f"^compilation failed on rank {culprit}: Value")
    with pytest.raises(kind, match=message):
        compile_in_turn(call, comm)


def test_ranks_that_wait_for_too_long_give_up(comm: MPI.Comm) -> None:
    if comm.size == 1:
        compile_in_turn(lambda: time.sleep(0.3), comm, deadline=0.1)
        return
    with pytest.raises(TimeoutError, match=r"longer than the deadline of 0\.1 seconds"):
        compile_in_turn(lambda: time.sleep(0.5) if comm.rank == 0 else None, comm, deadline=0.1)
    comm.Barrier()


def test_an_exchange_outside_compiled_code_is_refused_in_a_rehearsal(mesh: Mesh) -> None:
    with (
        rehearsal(),
        pytest.raises(RuntimeError, match="rehearsal: an exchange between ranks is outside compiled code"),
    ):
        global_sum(torch.ones(2), mesh.state_comm)
