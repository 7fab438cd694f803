"""The data of the flows problem: rows to learn from and rows to judge by, and what is known of their density."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.flows.config import EMBEDDED, FILES, FlowsConfig
from pnode_dist.problems.flows.densities import PLANAR_DENSITIES, Array, Density, LogDensity
from pnode_dist.problems.flows.tables import Split, embedded, published

_DRAWN = 1
Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class FlowsData:
    """All rows `[row, dimension]`, on every rank: to learn from, to validate with, to test on.

    `log_density` is the true one of rows in float64, in nats, where it is known. `fitted` is the normal distribution
    with the mean and covariance of the rows to learn from.
    """

    training: Rows
    validation: Rows
    test: Rows
    log_density: LogDensity | None
    fitted: Normal

    @property
    def dimension(self) -> int:
        """The entries of a row."""
        return int(self.training.shape[1])


@dataclass(frozen=True)
class Normal:
    """The normal distribution of this mean, with a covariance whose Cholesky factor is `factor`."""

    mean: Array
    factor: Array

    def sample(self, count: int, generator: np.random.Generator) -> Array:
        """So many points `[count, dimension]`."""
        drawn: Array = self.mean + generator.normal(size=(count, len(self.mean))) @ self.factor.T
        return drawn

    def log_density(self, points: Array) -> Array:
        """The log density `[point]` in nats."""
        whitened = np.linalg.solve(self.factor, (points - self.mean).T)
        scale = np.log(np.diagonal(self.factor)).sum() + len(self.mean) * math.log(2 * math.pi) / 2
        found: Array = -(whitened**2).sum(axis=0) / 2 - scale
        return found


def load(config: FlowsConfig) -> FlowsData:
    """The configured rows. Every rank gets the same; not collective.

    Raises `ConfigurationError` for a covariance that is none, for files that are missing or damaged, and where
    scikit-learn is needed and missing.
    """
    name, truth = config.density, None
    if name in FILES:
        assert config.directory is not None
        split = published(name, config.directory)
    elif name in EMBEDDED:
        split = embedded(name, config.seed)
    else:
        density = _given(config) if name == "gaussian" else PLANAR_DENSITIES[name]()
        truth = density.log_density
        training, validation, test = (
            density.sample(count, np.random.default_rng([_DRAWN, config.seed, part]))
            for part, count in enumerate((config.samples, config.validation, config.test))
        )
        split = Split(training, validation, test)
    return FlowsData(*split, truth, _fitted(split.training))


def _given(config: FlowsConfig) -> Density:
    covariance = np.array(config.covariance)
    mean = np.array(config.mean) if config.mean else np.zeros(len(covariance))
    shown = [list(row) for row in config.covariance]
    if not np.array_equal(covariance, covariance.T):
        raise ConfigurationError(f"[problem] covariance = {shown}: must be symmetric")
    try:
        normal = Normal(mean, np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:
        raise ConfigurationError(f"[problem] covariance = {shown}: must be positive definite") from None
    return Density(normal.sample, normal.log_density)


def _fitted(rows: Rows) -> Normal:
    """The most likely normal distribution; raises `ConfigurationError` where rows fill no volume."""
    exact = rows.astype(np.float64)
    try:
        factor = np.linalg.cholesky(np.atleast_2d(np.cov(exact, rowvar=False, bias=True)))
    except np.linalg.LinAlgError:
        raise ConfigurationError(
            f"[problem]: the {len(rows)} rows to learn from lie in a subspace of their {exact.shape[1]} dimensions: "
            "there must be more of them, or fewer columns"
        ) from None
    return Normal(exact.mean(axis=0), factor.astype(np.float64))
