"""How a flow is judged: the likelihood of rows that it has not seen, what it draws, and whether it is a density at all.

Each state rank takes a part of the rows; what it finds is gathered on all of them, so that every figure is the same on
every rank. All traces are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from pnode_dist.mesh import Mesh
from pnode_dist.partition.protocol import even_ranges
from pnode_dist.problems.flows_data import FlowsData, Rows
from pnode_dist.problems.flows_model import ContinuousFlow
from pnode_dist.problems.planar_densities import Array
from pnode_dist.report.flow_file import FlowContents, PlanarMap

_DERIVATIVES_AT_ONCE = 50_000
_MARGIN = 0.25
_PATHS, _PIECES = 60, 12


def judge(
    flow: ContinuousFlow, data: FlowsData, base: Array, cells: int | None, mesh: Mesh, dtype: torch.dtype
) -> tuple[dict[str, Any], FlowContents]:
    """The figures of a flow, and what to store and to draw of it. Collective on the state ranks.

    Log-likelihoods are means over the test rows with their standard errors, in nats: of the flow, of the normal
    distribution that fits the rows to learn from best, and of the true density where it is known; `short_of_truth` is
    what the flow lacks of that. Samples are drawn from the flow for the noise `base`; going back from them,
    `inversion_error` is the largest difference to that noise, and `log_density_error` the largest to the log density
    that drawing them found. With `cells`, for a density in the plane, it is mapped on so many cells along each axis of
    a box that reaches beyond all rows by a quarter of their width on each side, and `integral` is its sum over them.
    """
    test = data.test.astype(np.float64)
    known = {
        "flow": log_density(flow, data.test, mesh, dtype),
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
    samples, drawn = _over_ranks(flow.sample, base, mesh, dtype, data.dimension)
    origins, found = _over_ranks(lambda rows: flow(rows)[:2], samples, mesh, dtype, data.dimension)
    figures["inversion_error"] = float(np.abs(origins - base).max())
    figures["log_density_error"] = float(np.abs(found - drawn).max())
    planar, paths = None, None
    if cells is not None:
        planar = _map(flow, data, cells, mesh, dtype)
        figures["integral"] = float(np.exp(planar.flow).sum()) * planar.cell
        (ways,) = _over_ranks(
            lambda rows: (flow.paths(rows, _PIECES).transpose(0, 1),), base[:_PATHS], mesh, dtype, data.dimension
        )
        paths = ways.swapaxes(0, 1)
    return figures, FlowContents(samples, drawn, test, known, planar, paths)


def log_density(model: nn.Module, rows: Rows, mesh: Mesh, dtype: torch.dtype) -> Array:
    """The log density `[row]` in nats of whole `rows` `[row, dimension]`. Collective on the state ranks."""
    return _over_ranks(lambda part: (model(part).log_density,), rows, mesh, dtype, rows.shape[1])[0]


def _over_ranks(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    rows: Rows,
    mesh: Mesh,
    dtype: torch.dtype,
    derivatives: int,
) -> tuple[Array, ...]:
    """What `function` gives for each of the rows, whole on every rank, in float64; each state rank does its part of
    them, so many at once as the `derivatives` of each allow. Collective on the state ranks."""
    begin, end = even_ranges(len(rows), mesh.state_ranks)[mesh.state_rank]
    most = math.ceil(len(rows) / mesh.state_ranks)
    # As many on every rank: they solve together.
    pieces = math.ceil(most * derivatives / _DERIVATIVES_AT_ONCE)
    own = torch.from_numpy(rows[begin:end]).to(dtype)
    found = [function(own[first:last]) for first, last in even_ranges(end - begin, pieces)]
    whole = (torch.cat(parts).detach().double().numpy() for parts in zip(*found, strict=True))
    return tuple(np.concatenate(mesh.state_comm.allgather(part)) for part in whole)


def _map(flow: ContinuousFlow, data: FlowsData, cells: int, mesh: Mesh, dtype: torch.dtype) -> PlanarMap:
    rows = np.concatenate([data.training, data.validation, data.test]).astype(np.float64)
    low, high = rows.min(axis=0), rows.max(axis=0)
    width = (1 + 2 * _MARGIN) * float((high - low).max())
    centres = (low + high) / 2 + ((np.arange(cells) + 0.5) / cells - 0.5)[:, None] * width
    x, y = centres.T
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    found = {"flow": log_density(flow, points, mesh, dtype)}
    if data.log_density is not None:
        found["truth"] = data.log_density(points)
    shaped = {name: values.reshape(cells, cells) for name, values in found.items()}
    return PlanarMap(x, y, (width / cells) ** 2, shaped["flow"], shaped.get("truth"))


def _moments(values: Array) -> dict[str, float]:
    """The mean, and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"nats": float(values.mean()), "standard_error": error}
