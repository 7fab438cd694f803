"""Sum of parameter gradients over all ranks, as after every backward pass of training: mpi against gloo."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.distributed.gradients import parallel
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError

SIZES = {1_000: 200, 1_000_000: 20}
LARGEST_TIME_RATIO = 1.0
_BACKENDS = ("mpi", "gloo")
_ROUNDS = 3


class Weights(nn.Module):
    """A given number of parameters with a backward pass of negligible cost besides their sum."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, factor: float) -> torch.Tensor:
        """Return a sum whose gradient is `factor` everywhere."""
        return factor * self.weight.sum()


def run() -> Report:
    """Measure both backends over all ranks, in turn. Collective on the world."""
    size = MPI.COMM_WORLD.size
    if size < 2:
        raise ConfigurationError("bench sync needs 2 or more ranks: start it with launch/mpirun.sh -n 2")
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in _BACKENDS for n in SIZES}
    error = 0.0
    for _ in range(_ROUNDS):
        for backend in _BACKENDS:
            with Mesh(backend=backend) as mesh:
                for n, repeats in SIZES.items():
                    model = Weights(n)
                    ddp = parallel(model, mesh)
                    seconds[backend, n] += list(_seconds(ddp, mesh, repeats))
                    expected = size * (size + 1) / 2
                    assert model.weight.grad is not None
                    error = max(error, (model.weight.grad - expected).abs().max().item())
    rows: list[Row] = []
    checks = [Check("difference of the sum from the exact one", error, 0.0)]
    for n in SIZES:
        mpi, gloo = (statistics.median(seconds[backend, n]) for backend in _BACKENDS)
        rows.append({"floats": n, "mpi": mpi, "gloo": gloo, "over_gloo": mpi / gloo})
        checks.append(Check(f"time over gloo's, {n} floats", mpi / gloo, LARGEST_TIME_RATIO))
    notes = (f"Seconds for one backward pass under DistributedDataParallel on {size} ranks, median, slowest rank.",)
    return Report("sync", rows, checks, notes)


def _seconds(ddp: nn.Module, mesh: Mesh, repeats: int) -> Iterator[float]:
    """Return the slowest rank's seconds of each backward pass, without the first few."""
    for repeat in range(repeats + 3):
        ddp.zero_grad(set_to_none=True)
        share = ddp(mesh.rank + 1.0)
        mesh.barrier()
        began = time.perf_counter()
        share.backward()
        slowest = mesh.max(torch.tensor([time.perf_counter() - began], dtype=torch.float64)).item()
        if repeat >= 3:
            yield slowest
