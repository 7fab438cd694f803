"""Scores of long runs: the part of the error of a run without closure that a closure removes.

A. Ross, Z. Li, P. Perezhogin, C. Fernandez-Granda, L. Zanna: Benchmarking of machine learning ocean subgrid
parameterizations in an idealized model, J. Adv. Model. Earth Syst. 15, e2022MS003258 (2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import numpy as np

from pnode_dist.problems.qg.diagnostics import DISTRIBUTIONS, LAYERED, SPECTRA, Diagnostics
from pnode_dist.problems.qg.spectra import Array

DISTRIBUTIONAL = tuple(f"{name}{layer}" for name in DISTRIBUTIONS for layer in (1, 2))
"""The scores of distributions: q1 is that of q in the upper layer, q2 that in the lower one."""
SPECTRAL = (
    *(f"{name}{layer}" for name in LAYERED for layer in (1, 2)),
    *(name for name in SPECTRA if name not in LAYERED),
)
"""The scores of spectra."""


def wasserstein_distance(first: Array, second: Array) -> float:
    """Return the first Wasserstein distance of two samples: the area between their distribution functions."""
    first, second = np.sort(first, axis=None), np.sort(second, axis=None)
    both = np.sort(np.concatenate([first, second]))
    shares = [np.searchsorted(sample, both[:-1], side="right") / len(sample) for sample in (first, second)]
    return float((np.abs(shares[0] - shares[1]) * np.diff(both)).sum())


def differences(first: Diagnostics, second: Diagnostics) -> dict[str, float]:
    """Return the distances of two runs' statistics, by the names of `DISTRIBUTIONAL` and `SPECTRAL`.

    Distributions differ by their Wasserstein distance, spectra by the root mean square over the bins that both grids
    resolve. The grids may differ, the domains may not.
    """
    found = {}
    for name in DISTRIBUTIONS:
        for layer in range(2):
            samples = first.values[name][:, layer], second.values[name][:, layer]
            found[f"{name}{layer + 1}"] = wasserstein_distance(*samples)
    count = int((first.wave_number < min(first.resolved, second.resolved)).sum())
    for name in SPECTRA:
        departure = first.spectra[name][..., :count] - second.spectra[name][..., :count]
        errors = np.sqrt(np.square(departure).mean(-1))
        if name in LAYERED:
            found |= {f"{name}{layer + 1}": float(error) for layer, error in enumerate(errors)}
        else:
            found[name] = float(errors)
    return found


def similarities(run: Diagnostics, truth: Diagnostics, baseline: Diagnostics) -> dict[str, float]:
    """Return 1 - difference(run, truth) / difference(baseline, truth) for each statistic.

    1 is the truth and 0 the baseline, the coarse grid without closure; below 0 a closure does harm. Where the baseline
    does not differ from the truth, the score is 1 for a run that does not either, else minus infinity.
    """
    mine, coarse = differences(run, truth), differences(baseline, truth)
    return {name: _similarity(mine[name], coarse[name]) for name in mine}


def _similarity(difference: float, baseline: float) -> float:
    if baseline == 0:
        return 1.0 if difference == 0 else -math.inf
    return 1 - difference / baseline


def means(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean scores of distributions and of spectra."""
    return {
        "distributional": fmean(scores[name] for name in DISTRIBUTIONAL),
        "spectral": fmean(scores[name] for name in SPECTRAL),
    }
