"""The growth of resident memory over many calls of `odeint`, by method: a program for any number of ranks.

`resident_memory.py CALLS ENTRIES CASE...` with cases such as `cn`, `cn+adaptive` or `cn+raises`. Prints on the first
rank a line of JSON for each: the case, and by how many MiB the fullest rank has grown since its hundredth call.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from pnode_dist import DensePartition, odeint
from pnode_dist.ode.methods import METHODS, has_adjoint
from pnode_dist.petsc.objects import destroy_left

WARM_UP, MIB = 100, 2**20
D = torch.float64


class RefusedError(Exception):
    """Raised by a right-hand side."""


def resident() -> float:
    """The resident memory of this process in MiB. Collective.

    Without what only waits for Python's collector or for the other ranks' consent, and without pages that the C library
    keeps though they are free.
    """
    gc.collect()
    destroy_left(MPI.COMM_WORLD)
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / MIB


def growth(case: str, calls: int, entries: int) -> float:
    """By how much the fullest rank grows: in turns a gradient, a graph that is dropped and a solve without one."""
    comm = MPI.COMM_WORLD
    name, _, kind = case.partition("+")
    differentiable = has_adjoint(METHODS[name])
    partition = DensePartition(comm, entries * comm.size) if comm.size > 1 else None
    rate = torch.full((1,), 0.5, dtype=D, requires_grad=differentiable)
    u0: Any = torch.ones(entries, dtype=D)
    u0 = (u0, u0.clone()) if METHODS[name].family == "symplectic" else u0
    seen = 0

    def f(t: torch.Tensor, u: Any) -> Any:
        nonlocal seen
        seen += 1
        if kind == "raises" and seen == 2:
            raise RefusedError
        return (-rate * u[1], rate * u[0]) if isinstance(u, tuple) else -rate * u

    control: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2} if kind == "adaptive" else {"step_size": 0.5}
    # Measured between two calls, each time after a call of the same kind.
    warm_up, after_warm_up = WARM_UP + (calls - WARM_UP) % 3, 0.0
    for call in range(calls):
        if call == warm_up:
            after_warm_up = resident()
        seen = 0
        with torch.set_grad_enabled(differentiable and call % 3 < 2):
            try:
                solution = odeint(f, u0, [0.0, 1.0], method=name, partition=partition, **control)
                assert kind != "raises"
            except RefusedError:
                continue
            if differentiable and call % 3 == 0:
                sum(part.sum() for part in solution).backward()
            del solution
    return float(comm.allreduce(resident() - after_warm_up, MPI.MAX))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[3:]:
        grown = growth(each, int(sys.argv[1]), int(sys.argv[2]))
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps({"case": each, "MiB": round(grown, 3)}), flush=True)
