"""Evaluation of closures by long runs: statistics, published scores, and the variables for the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.qg.config import QGParameters
from pnode_dist.problems.qg.diagnostics import DISTRIBUTIONS, LAYERED, SPECTRA, Diagnostics, diagnose, mean_energy
from pnode_dist.problems.qg.scores import DISTRIBUTIONAL, SPECTRAL, means, similarities
from pnode_dist.problems.qg.spectra import Array
from pnode_dist.report.dataset_file import Variable

TRUTH, BASELINE = "truth", "no_closure"
_CELLS = 60
_EXTREME = 0.1
_BEYOND = 0.3


@dataclass(frozen=True)
class Run:
    """A run with a closure, or the truth, `[time, ny, nx, 2]` or several runs of it; whole, or this rank's part.

    `q` is in 1/s, and finite. `forcing`, in the shape of `q`, is the forcing of dq/dt by the closure in 1/s2, for the
    truth by the scales that the grid does not resolve; None is zero. `blown_up` is the day of the first sample that is
    not finite, if any.
    """

    q: Any
    forcing: Any = None
    blown_up: float | None = None


def evaluated(
    runs: Mapping[str, Run], parameters: QGParameters, interval: float, partition: GridPartition, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Variable]]:
    """Return the figures of long runs on all ranks, and the variables of the file. Collective on the world.

    `runs` are this rank's parts, tensors, by their names: `truth`, `no_closure` and others. `interval` is the time
    between samples in days. Rank 0 gathers one run after the other. Raises `ConfigurationError` on all ranks as
    `evaluation_of` does.
    """
    whole = {name: _gathered(run, partition, mesh) for name, run in runs.items()}
    found = agreed(mesh, lambda: evaluation_of(whole, parameters, interval) if mesh.is_root else ({}, {}))
    figures: dict[str, Any] = mesh.broadcast_object(found[0])
    return figures, {**found[1], **_fields(runs, partition)}


def _gathered(run: Run, partition: GridPartition, mesh: Mesh) -> Run:
    """Return the whole run on rank 0, an empty one elsewhere. Collective on the partition."""
    q = partition.gather(run.q)
    forcing = None if run.forcing is None else partition.gather(run.forcing)
    if not mesh.is_root:
        return Run(None)
    return Run(_numpy(q), None if forcing is None else _numpy(forcing), run.blown_up)


def _numpy(whole: torch.Tensor | None) -> Array:
    assert whole is not None
    values: Array = whole.detach().double().cpu().numpy()
    return values


def _fields(runs: Mapping[str, Run], partition: GridPartition) -> dict[str, Variable]:
    """Return the states of all runs, the first of several, as one variable. Samples that a run lacks are missing."""
    first = {name: run.q if run.q.dim() == 4 else run.q[0] for name, run in runs.items()}
    samples = max(len(q) for q in first.values())
    states = torch.full((len(first), samples, *partition.local_shape), torch.nan)
    for number, q in enumerate(first.values()):
        states[number, : len(q)] = q
    names = ("free_run", "sample", *partition.axes, "layer")
    return {"free_run_q": Variable(names, states, {"units": "1/s"}, np.float32, partition)}


def evaluation_of(
    runs: Mapping[str, Run], parameters: QGParameters, interval: float
) -> tuple[dict[str, Any], dict[str, Variable]]:
    """Return the figures of long runs, and the variables of the file. `runs` are whole, in numpy. Not collective.

    Statistics are of the second half of each run, as in the benchmark, because a run begins at the truth, and of all of
    the truth. A run that blew up has no scores, and none has any if the run without closure did. Raises
    `ConfigurationError` if `runs` lack the truth or the run without closure.
    """
    for name in (TRUTH, BASELINE):
        if name not in runs:
            raise ConfigurationError(f"evaluation: runs = {', '.join(runs)}: must have {name}")
    statistics = {
        name: _statistics(run, parameters, after=0.0 if name == TRUTH else 0.5)
        for name, run in runs.items()
        if run.blown_up is None
    }
    scores: dict[str, dict[str, float]] = {}
    if BASELINE in statistics:
        truth, baseline = statistics[TRUTH], statistics[BASELINE]
        scores = {name: similarities(found, truth, baseline) for name, found in statistics.items() if name != TRUTH}
    ends = [
        {
            "of": name,
            "days": (run.q.shape[-4] - 1) * interval,
            "blown_up": run.blown_up,
            **(means(scores[name]) if name in scores else {"distributional": None, "spectral": None}),
        }
        for name, run in runs.items()
        if name != TRUTH
    ]
    table = [
        {"statistic": name, **{run: found[name] for run, found in scores.items() if run != BASELINE}}
        for name in (*DISTRIBUTIONAL, *SPECTRAL)
        if scores
    ]
    variables = {
        "free_run": Variable(("free_run",), np.array(list(runs))),
        "sample_time": Variable(("sample",), np.arange(_longest(runs)) * interval, {"units": "days"}),
        "energy": Variable(("free_run", "sample"), _energies(runs, parameters), {"units": "m2/s2"}),
        **_spectra(runs, statistics),
        **_densities(runs, statistics),
    }
    return {"free_runs": ends, "scores": table}, variables


def _statistics(run: Run, parameters: QGParameters, after: float) -> Diagnostics:
    """Return the statistics of a run after a part of its length, at least of one sample."""
    times = run.q.shape[-4]
    late = (..., slice(int(after * times), None), *[slice(None)] * 3)
    return diagnose(run.q[late], parameters, None if run.forcing is None else run.forcing[late], times)


def _longest(runs: Mapping[str, Run]) -> int:
    """Return the number of samples of the longest run."""
    return max(int(run.q.shape[-4]) for run in runs.values())


def _energies(runs: Mapping[str, Run], parameters: QGParameters) -> Array:
    """Return the mean kinetic energy of the eddies at each sample, `[run, sample]`, of the first of several runs."""
    found = np.full((len(runs), _longest(runs)), np.nan)
    for number, run in enumerate(runs.values()):
        states = run.q if run.q.ndim == 4 else run.q[0]
        found[number, : len(states)] = [mean_energy(q, parameters) for q in states]
    return found


def _spectra(runs: Mapping[str, Run], statistics: Mapping[str, Diagnostics]) -> dict[str, Variable]:
    """Return all spectra, NaN for runs without statistics."""
    truth = statistics[TRUTH]
    found = {
        "wave_number": Variable(("wave_number",), truth.wave_number, {"units": "rad/m", "resolved": truth.resolved})
    }
    for name in SPECTRA:
        missing = np.full_like(truth.spectra[name], np.nan)
        values = np.stack([statistics[run].spectra[name] if run in statistics else missing for run in runs])
        layers = ("layer",) if name in LAYERED else ()
        found[name] = Variable(("free_run", *layers, "wave_number"), values)
    return found


def _densities(runs: Mapping[str, Run], statistics: Mapping[str, Diagnostics]) -> dict[str, Variable]:
    """Return the probability densities of all distributions, in cells around the values of the truth."""
    found = {}
    for name in DISTRIBUTIONS:
        low, high = np.percentile(statistics[TRUTH].values[name], [_EXTREME, 100 - _EXTREME], axis=0)
        margin = _BEYOND * (high - low)
        edges = np.linspace(low - margin, high + margin, _CELLS + 1)
        density = np.full((len(runs), 2, _CELLS), np.nan)
        for number, run in enumerate(runs):
            if run in statistics:
                for layer in range(2):
                    values = statistics[run].values[name][:, layer]
                    counts, _ = np.histogram(values, edges[:, layer])
                    density[number, layer] = counts / (len(values) * (edges[1, layer] - edges[0, layer]))
        found[f"density_{name}"] = Variable(("free_run", "layer", "cell"), density)
        found[f"cells_{name}"] = Variable(("layer", "cell"), (edges[1:].T + edges[:-1].T) / 2)
    return found
