"""The rows of the flows problem: normal distributions against scipy's, and what draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.flows.config import FlowsConfig
from pnode_dist.problems.flows.data import FlowsData, load
from tests.unit.problems.flows.plain_flows import problem

MEAN, COVARIANCE = (0.5, -1.0, 0.0), ((2.0, 0.6, 0.1), (0.6, 1.0, -0.3), (0.1, -0.3, 0.5))


def loaded(**changes: Any) -> FlowsData:
    return load(FlowsConfig.model_validate(problem(**changes)))


def gaussian(**changes: Any) -> FlowsData:
    return loaded(**({"density": "gaussian", "mean": MEAN, "covariance": COVARIANCE} | changes))


def test_the_true_density_of_a_gaussian_is_scipy_s() -> None:
    data = gaussian()
    assert data.log_density is not None
    expected = multivariate_normal(MEAN, COVARIANCE).logpdf(data.test)
    np.testing.assert_allclose(data.log_density(data.test), expected, rtol=1e-12)


def test_samples_of_a_gaussian_have_its_mean_and_covariance() -> None:
    data = gaussian(samples=40_000)
    assert data.dimension == 3
    np.testing.assert_allclose(data.training.mean(axis=0), MEAN, atol=0.04)
    np.testing.assert_allclose(np.cov(data.training.T), COVARIANCE, atol=0.06)


def test_the_fitted_normal_distribution_is_that_of_the_rows_to_learn_from() -> None:
    data = loaded()
    training = data.training
    expected = multivariate_normal(training.mean(axis=0), np.cov(training.T, bias=True)).logpdf(data.test)
    np.testing.assert_allclose(data.fitted.log_density(data.test), expected, rtol=1e-12)


def test_parts_differ_and_keep_their_samples_when_others_grow() -> None:
    data, more = loaded(), loaded(samples=50, validation=20)
    assert [len(part) for part in (data.training, data.validation, data.test)] == [23, 11, 13]
    assert np.array_equal(data.test, more.test)
    assert not np.array_equal(data.training[:11], data.validation)
    assert not np.array_equal(loaded(seed=1).test, data.test)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"covariance": ((1.0, 0.5), (0.4, 1.0)), "mean": ()}, "[[1.0, 0.5], [0.4, 1.0]]: must be symmetric"),
        ({"covariance": ((1.0, 2.0), (2.0, 1.0)), "mean": ()}, "[[1.0, 2.0], [2.0, 1.0]]: must be positive definite"),
    ],
)
def test_a_matrix_that_is_no_covariance_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        gaussian(**changes)
    assert str(caught.value) == f"[problem] covariance = {message}"


def test_too_few_rows_to_fill_their_space_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="the 2 rows to learn from lie in a subspace of their 3 dimensions"):
        gaussian(samples=2)
