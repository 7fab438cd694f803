"""Evaluation of a flow: the likelihood of unseen rows, samples of the flow, and the integral of its density.

Each state rank processes a part of the rows. Results are gathered on all state ranks, so every value is the same on
every rank. All traces are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.partition.protocol import even_ranges
from pnode_dist.problems.flows.data import FlowsData, Rows
from pnode_dist.problems.flows.densities import Array
from pnode_dist.problems.flows.model import ContinuousFlow
from pnode_dist.report.dataset_file import Variable

_DERIVATIVES_AT_ONCE = 50_000
_MARGIN = 0.25
_PATHS, _PIECES = 60, 12


@dataclass(frozen=True)
class DistributedFlow:
    """A flow in `dtype` of samples distributed over the state ranks of `mesh`.

    `partition_of` returns the distribution of a number of samples, always the same object for the same number.
    """

    flow: ContinuousFlow
    mesh: Mesh
    partition_of: Callable[[int], BatchPartition]
    dtype: torch.dtype

    def log_density(self, rows: Rows) -> Array:
        """Return the log density `[row]` in nats of all `rows` `[row, dimension]`. Collective on the state ranks."""
        return self.over(lambda part: (self.flow(part).log_density,), rows)[0]

    def over(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], rows: Rows) -> tuple[Array, ...]:
        """Apply `function` to all `rows`. Returns whole results on every rank, float64. Collective on the state ranks.

        Processes the rows in blocks, each rank its part of a block. The number of derivatives per row limits the block
        size.
        """
        blocks = math.ceil(rows.size / (_DERIVATIVES_AT_ONCE * self.mesh.state_ranks))
        found = []
        for first, last in even_ranges(len(rows), blocks):
            partition = self.partition_of(last - first)
            self.flow.distribute_over(partition)
            own = torch.from_numpy(rows[first:last][slice(*partition.owned)]).to(self.dtype)
            parts = [part.detach().double().numpy() for part in function(own)]
            found.append([np.concatenate(self.mesh.state_comm.allgather(part)) for part in parts])
        return tuple(np.concatenate(pieces) for pieces in zip(*found, strict=True))


def evaluate_flow(
    spread: DistributedFlow, data: FlowsData, base: Array, cells: int | None
) -> tuple[dict[str, Any], dict[str, Variable]]:
    """Return the evaluation of a flow, and the variables of its file. Collective on the state ranks.

    Log-likelihoods are means over the test rows with their standard errors, in nats: of the flow, of the normal
    distribution fitted to the training rows, and of the true density if known. `short_of_truth` is the shortfall of the
    flow against the true density. The flow maps the noise `base` to samples. The inverse map of these samples gives
    `inversion_error`, the largest difference to `base`, and `log_density_error`, the largest difference to the log
    density found in sampling. With `cells`, a density in the plane is mapped on that many cells along each axis of a
    box. The box extends beyond all rows by a quarter of their width on each side. `integral` is the integral of the
    density over the box.
    """
    flow, test = spread.flow, data.test.astype(np.float64)
    known = {
        "flow": spread.log_density(data.test),
        "fitted_normal": data.fitted.log_density(test),
        **({} if data.log_density is None else {"truth": data.log_density(test)}),
    }
    figures: dict[str, Any] = {
        "dimension": data.dimension,
        "rows": f"{len(data.training)} to learn from, {len(data.validation)} to validate with, {len(test)} to test on",
        "log_likelihood": [{"of": name, **_moments(values)} for name, values in known.items()],
    }
    if "truth" in known:
        figures["short_of_truth"] = _moments(known["truth"] - known["flow"])
    samples, drawn = spread.over(flow.sample, base)
    origins, found = spread.over(lambda rows: flow(rows)[:2], samples)
    figures["inversion_error"] = float(np.abs(origins - base).max())
    figures["log_density_error"] = float(np.abs(found - drawn).max())
    variables = {
        "samples": Variable(("sample", "dimension"), samples),
        "sample_log_density": Variable(("sample",), drawn),
        "test": Variable(("row", "dimension"), test),
        **{f"test_log_density_{name}": Variable(("row",), values) for name, values in known.items()},
    }
    if cells is not None:
        variables |= _map(spread, data, cells)
        x, y = variables["x"].values, variables["y"].values
        area = float((x[1] - x[0]) * (y[1] - y[0]))
        figures["integral"] = float(np.exp(variables["log_density"].values).sum()) * area
        (ways,) = spread.over(lambda rows: (flow.paths(rows, _PIECES).transpose(0, 1),), base[:_PATHS])
        variables["paths"] = Variable(("time", "path", "dimension"), ways.swapaxes(0, 1))
    return figures, variables


def _map(spread: DistributedFlow, data: FlowsData, cells: int) -> dict[str, Variable]:
    """Return log densities `[y, x]` at the cell centres, with the true one if it is known."""
    rows = np.concatenate([data.training, data.validation, data.test]).astype(np.float64)
    low, high = rows.min(axis=0), rows.max(axis=0)
    width = (1 + 2 * _MARGIN) * float((high - low).max())
    centres = (low + high) / 2 + ((np.arange(cells) + 0.5) / cells - 0.5)[:, None] * width
    x, y = centres.T
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    found = {"log_density": spread.log_density(points)}
    if data.log_density is not None:
        found["true_log_density"] = data.log_density(points)
    shaped = {name: Variable(("y", "x"), values.reshape(cells, cells)) for name, values in found.items()}
    return {"x": Variable(("x",), x), "y": Variable(("y",), y), **shaped}


def _moments(values: Array) -> dict[str, float]:
    """Return the mean and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"nats": float(values.mean()), "standard_error": error}
