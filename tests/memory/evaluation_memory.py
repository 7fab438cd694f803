"""The peak of resident memory of an evaluation with few leads, and with many: a program for any number of ranks.

`evaluation_memory.py DIRECTORY LEADS ENTRIES` evaluates two forecasts of a state of ENTRIES numbers on each rank.
Prints on the first rank a line of JSON: the leads, and by how many MiB the fullest rank has grown in the evaluation.
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

from pnode_dist import DensePartition, ForecastProblem, Mesh, TrajectoryData
from pnode_dist.config.load import from_tables, validated
from pnode_dist.config.registry import Registered, definition_of

D = torch.float64
STARTS, MIB = 2, 2**20


class Decay(torch.nn.Module):
    """du/dt = -rate u."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.01, dtype=D))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.rate * u


class Total:
    """A figure that is computed from the forecasts: the sum of all states of the model."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.total = mesh, torch.zeros(1, dtype=D)

    def add(self, name: str, row: Any) -> None:
        if name == "model":
            self.total += row.states.sum()

    def result(self) -> float:
        return self.mesh.sum(self.total, over="state").item()


def kind_of(leads: int, entries: int) -> type[ForecastProblem]:
    """The class of a problem with one trajectory, of which the last times hold two forecasts."""

    class Vector(ForecastProblem):
        def build_partition(self) -> Any:
            return DensePartition(self.mesh, entries * self.mesh.state_ranks)

        def load_data(self) -> Any:
            times = torch.arange(3 + STARTS + leads, dtype=D)
            start = torch.linspace(1.0, 2.0, self.partition.local_shape[0], dtype=D)
            return TrajectoryData(torch.exp(-0.02 * times)[:, None] * start, times.numpy(), local=True)

        def build_right_hand_side(self) -> torch.nn.Module:
            return Decay()

        def figures(self, batch: Any) -> dict[str, Any]:
            return {"total": Total(self.mesh)}

    return Vector


def status(key: str) -> float:
    """A line of this process's memory in MiB, such as VmRSS or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def growth(directory: Path, leads: int, entries: int) -> float:
    """By how much the fullest rank grows during an evaluation. Collective on the world."""
    tables = {
        "run": {"name": "memory"},
        "problem": {"type": "memory", "validation": leads + STARTS - 1},
        "training": {"epochs": 1, "batch_size": 1, "dtype": "float64"},
        "solver": {"method": "rk4"},
        "evaluation": {"leads": [1, leads]},
    }
    found = Registered("memory", definition_of(kind_of(leads, entries), "memory"), None)
    with Mesh() as mesh:
        problem: Any = found.definition.builder()(validated(from_tables(tables, "memory"), found), mesh, D)
        assert len(problem.held_out_windows(D).starts) == STARTS
        _ = problem.moments
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        # Starts a new peak.
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        with torch.no_grad():
            result = problem.evaluate(problem.model, directory)
        assert result["total"] > 0
        assert Path(result["report"]).exists()
        return float(MPI.COMM_WORLD.allreduce(status("VmHWM") - before, MPI.MAX))


if __name__ == "__main__":
    torch.set_num_threads(1)
    grown = growth(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps({"leads": int(sys.argv[2]), "MiB": round(grown, 3)}), flush=True)
