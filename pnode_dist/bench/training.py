"""One optimiser step of a configured problem at each `keep` level: seconds, evaluations and memory.

Compares the gradients of all levels, which are the same derivative of the same steps.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from mpi4py import MPI

from pnode_dist.bench.report import Check, Report, Row, interleaved
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.config.registry import Registered
from pnode_dist.config.tables import Config
from pnode_dist.distributed.gradients import parallel
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.train.problem import Batch, Problem
from pnode_dist.train.run import build_problem, mesh_of

LEVELS = ("auto", "graph", "stages", "solution")
REPEATS = 5
LARGEST_DIFFERENCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@dataclass
class _Way:
    """A problem with one `keep` level, and its first batch."""

    problem: Problem
    model: torch.nn.Module
    batch: Batch
    mesh: Mesh

    def seconds(self) -> float:
        """Return the seconds of a loss and its gradient on the slowest rank. Collective on the world."""
        self.model.zero_grad(set_to_none=True)
        self.mesh.barrier()
        began = time.perf_counter()
        self.problem.loss(self.model, self.batch).backward()  # type: ignore[no-untyped-call]
        return float(MPI.COMM_WORLD.allreduce(time.perf_counter() - began, MPI.MAX))

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the last call of `seconds`."""
        found = [value.grad for value in self.model.parameters() if value.grad is not None]
        return torch.cat([gradient.reshape(-1) for gradient in found])

    def statistics(self) -> SolveStatistics:
        """Return the counts of the last call of `seconds`."""
        return self.problem.solve_statistics()


def run(config: Config, found: Registered, repeats: int = REPEATS) -> Report:
    """Measure the configured problem on the configured mesh: medians of `repeats` turns. Collective on the world.

    A level that does not fit the configured budget is left out and noted.
    """
    with mesh_of(config) as mesh:
        ways: dict[str, _Way] = {}
        notes = []
        for level in LEVELS:
            try:
                ways[level] = _way(config, found, mesh, level)
                ways[level].seconds()
            except ConfigurationError as error:
                ways.pop(level, None)
                notes.append(f"keep = {level} is left out: {error}")
        if not ways:
            raise ConfigurationError(f"bench training: no way to keep the trajectory fits: {notes[0]}")
        seconds = interleaved({level: way.seconds for level, way in ways.items()}, repeats)
        reference = next(iter(ways.values())).gradient()
        rows: list[Row] = []
        largest = 0.0
        for level, way in ways.items():
            counts = way.statistics()
            difference = float((way.gradient() - reference).norm() / reference.norm().clamp(min=1e-300))
            largest = max(largest, difference)
            rows.append(
                {
                    "keep": level,
                    "seconds": statistics.median(seconds[level]),
                    "steps": counts.forward_steps,
                    "recomputed steps": counts.recomputed_steps,
                    "evaluations": counts.function_evaluations,
                    "vjps": counts.vjps,
                    "checkpoints, MiB": counts.checkpoint_bytes_peak / 2**20,
                    "kept graphs, MiB": counts.graph_bytes / 2**20,
                }
            )
        dtype = getattr(torch, config.training.dtype)
        checks = [Check("largest difference of the gradients", largest, LARGEST_DIFFERENCE[dtype])]
        name = f"training: {config.run.name}"
        notes.append(f"Loss and gradient of the first batch, median of {repeats} turns, on the slowest rank.")
        return Report(name, rows, checks, notes)


def _way(config: Config, found: Registered, mesh: Mesh, level: str) -> _Way:
    trajectory = config.trajectory.model_copy(update={"keep": level})
    problem = build_problem(config.model_copy(update={"trajectory": trajectory}), mesh, found=found)
    batch = next(problem.batches(1), None)
    if batch is None:
        raise ConfigurationError("there is no training batch: make batch_size smaller or the training part longer")
    return _Way(problem, parallel(problem.model, mesh), batch, mesh)
