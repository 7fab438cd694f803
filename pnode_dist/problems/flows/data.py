"""Data of the flows problem: rows for training, validation and test, and their true density if known."""

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
    """All rows `[row, dimension]`, on every rank: for training, validation and test.

    `log_density` returns the true log density of float64 rows in nats, if it is known. `fitted` is the normal
    distribution with the mean and covariance of the training rows.
    """

    training: Rows
    validation: Rows
    test: Rows
    log_density: LogDensity | None
    fitted: Normal

    @property
    def dimension(self) -> int:
        """Number of entries of a row."""
        return int(self.training.shape[1])


@dataclass(frozen=True)
class Normal:
    """Normal distribution with this mean. `factor` is the Cholesky factor of its covariance."""

    mean: Array
    factor: Array

    def sample(self, count: int, generator: np.random.Generator) -> Array:
        """Draw `count` points `[count, dimension]`."""
        drawn: Array = self.mean + generator.normal(size=(count, len(self.mean))) @ self.factor.T
        return drawn

    def log_density(self, points: Array) -> Array:
        """Return the log density `[point]` in nats."""
        whitened = np.linalg.solve(self.factor, (points - self.mean).T)
        scale = np.log(np.diagonal(self.factor)).sum() + len(self.mean) * math.log(2 * math.pi) / 2
        found: Array = -(whitened**2).sum(axis=0) / 2 - scale
        return found


def load(config: FlowsConfig) -> FlowsData:
    """Load the configured rows, the same on every rank. Not collective.

    Raises `ConfigurationError` for an invalid covariance matrix, for missing or damaged files, and if scikit-learn is
    needed but missing.
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
    """Fit the normal distribution of maximum likelihood. Raises `ConfigurationError` if the covariance is singular."""
    exact = rows.astype(np.float64)
    try:
        factor = np.linalg.cholesky(np.atleast_2d(np.cov(exact, rowvar=False, bias=True)))
    except np.linalg.LinAlgError:
        raise ConfigurationError(
            f"[problem]: the {len(rows)} rows to learn from lie in a subspace of their {exact.shape[1]} dimensions: "
            "there must be more of them, or fewer columns"
        ) from None
    return Normal(exact.mean(axis=0), factor.astype(np.float64))
