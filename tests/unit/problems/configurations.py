"""A small configuration of every registered problem, and what the contract of problems compares of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.config.tables import Config, SnapshotConfig
from pnode_dist.runs import snapshot_files
from pnode_dist.train import loop
from pnode_dist.train.problem import Batch
from pnode_dist.train.run import build_problem
from tests.unit.problems.field import synthetic_fields
from tests.unit.problems.flows import plain_flows
from tests.unit.problems.graph_diffusion import plain_graph_diffusion
from tests.unit.problems.gray_scott import plain_gray_scott
from tests.unit.problems.images import plain_images
from tests.unit.problems.pendulum import plain_pendulum
from tests.unit.problems.qg import plain_qg
from tests.unit.problems.robertson import plain_robertson
from tests.unit.problems.semilinear import plain_semilinear

EVERY_STEP = SnapshotConfig(every_steps=1, every_minutes=0, keep=100)


def _field(directory: Path, **tables: Any) -> Config:
    path = directory / "sst.nc"
    if MPI.COMM_WORLD.rank == 0 and not path.exists():
        synthetic_fields.write(path, synthetic_fields.dataset(synthetic_fields.values()))
    MPI.COMM_WORLD.Barrier()
    return synthetic_fields.config(path, **tables)


SMALL: dict[str, Callable[..., Any]] = {
    "burgers": lambda _, **tables: plain_semilinear.config("burgers", **tables),
    "field": _field,
    "flows": lambda _, **tables: plain_flows.config(**tables),
    "graph_diffusion": lambda _, **tables: plain_graph_diffusion.config(**tables),
    "gray_scott": lambda _, **tables: plain_gray_scott.config(**tables),
    "images": lambda _, **tables: plain_images.config(**tables),
    "kuramoto_sivashinsky": lambda _, **tables: plain_semilinear.config("kuramoto_sivashinsky", **tables),
    "pendulum": lambda _, **tables: plain_pendulum.config(**tables),
    "qg": lambda directory, **tables: plain_qg.config(directory, **tables),
    "robertson": lambda _, **tables: plain_robertson.config(**tables),
}
"""Makes the configuration with files in a directory, which all ranks share; tables change single keys."""
FORECASTS = tuple(name for name in SMALL if name not in ("flows", "images"))


def size_of(batch: Batch) -> int:
    """The windows, rows or images of a replica's share of a batch."""
    for name in ("starts", "numbers"):
        if hasattr(batch, name):
            return len(getattr(batch, name))
    return int(batch.count)


def parts_of(batch: Batch) -> list[Any]:
    """The tensors of a batch, and the numbers of its samples."""
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor | tuple | int)]


def are_equal(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists of `parts_of` hold the same."""
    return len(first) == len(second) and all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(first, second, strict=True)
    )


def numbers_in(table: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """The figures in a table of an evaluation, by their place in it."""
    if isinstance(table, dict):
        for key, value in table.items():
            yield from numbers_in(value, f"{place}.{key}")
    elif isinstance(table, list):
        for number, value in enumerate(table):
            yield from numbers_in(value, f"{place}[{number}]")
    elif isinstance(table, float):
        yield place, table


def trained(config: Config, mesh: Mesh, directory: Path, step: int | None = None) -> tuple[torch.Tensor, list[Any]]:
    """The parameters after a training, and its records; `step`: resumed from the snapshot of that step.

    Collective on the world. A snapshot is written after every step.
    """
    problem = build_problem(config, mesh, torch.float64)
    snapshot = None
    if step is not None:
        snapshot = snapshot_files.load(snapshot_files.path_of(directory, step))
        if mesh.is_root:
            with (directory / "metrics.jsonl").open("ab") as file:
                file.truncate(snapshot.position.metrics)
        MPI.COMM_WORLD.Barrier()
    loop.train(problem, config.training, mesh, directory, EVERY_STEP, snapshot)
    MPI.COMM_WORLD.Barrier()
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for changing in ("wall_time", "peak_memory"):
            record.pop(changing, None)
    return torch.cat([value.detach().flatten() for value in problem.model.parameters()]), records
