"""The data of the Robertson problem on one rank: scaled by the trajectories to learn from, the others held out."""

import numpy as np
import pytest
import torch

from pnode_dist import Mesh
from pnode_dist.problems.robertson.data import fastest_rate, generate, range_of, sample_times
from pnode_dist.problems.robertson.physics import Array
from pnode_dist.problems.robertson.problem import RobertsonProblem
from tests.unit.problems.robertson.plain_robertson import (
    LOG_TIMES,
    TIMES,
    TRAINING,
    VALIDATION,
    by_radau,
    config,
    problem_config,
)


@pytest.fixture(scope="module")
def data() -> tuple[Array, Array]:
    return generate(problem_config())


def test_samples_are_those_of_the_paper() -> None:
    config = problem_config(times=40)
    np.testing.assert_allclose(sample_times(config), np.logspace(-5, 2, 40), rtol=1e-12)


def test_validation_begins_with_the_problem_as_it_is_posed(data: tuple[Array, Array]) -> None:
    found = data[1]
    assert found.shape == (TIMES, VALIDATION, 3)
    np.testing.assert_allclose(found[:, 0], by_radau(np.array([1.0, 0.0, 0.0]), 10.0**LOG_TIMES), rtol=1e-7, atol=1e-14)


def test_training_and_validation_have_no_trajectory_in_common(data: tuple[Array, Array]) -> None:
    scaling = range_of(data[0])
    first = torch.cat([scaling.states(torch.from_numpy(part[0])) for part in data])
    distances = torch.cdist(first, first) + torch.eye(len(first))
    assert len(first) == TRAINING + VALIDATION
    assert distances.min() > 1e-3


def test_scaled_training_concentrations_reach_from_0_to_1(mesh: Mesh) -> None:
    values = RobertsonProblem(config(), mesh, torch.float64).samples.values.flatten(0, 2)
    torch.testing.assert_close(values.amin(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(values.amax(0), torch.ones(3, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_rate_is_the_fastest_change_between_samples(data: tuple[Array, Array]) -> None:
    times = 10.0**LOG_TIMES
    changes = np.abs(np.diff(data[0], axis=0)) / np.diff(times)[:, None, None]
    found = fastest_rate(torch.from_numpy(data[0]), torch.from_numpy(times))
    np.testing.assert_allclose(found, changes.max(axis=(0, 1)), rtol=1e-10)


def test_what_is_held_out_does_not_change_what_is_learnt_from(data: tuple[Array, Array]) -> None:
    assert np.array_equal(generate(problem_config(validation=VALIDATION + 1))[0], data[0])


def test_the_seed_chooses_the_trajectories(data: tuple[Array, Array]) -> None:
    assert np.array_equal(generate(problem_config())[0], data[0])
    assert not np.allclose(generate(problem_config(seed=1))[0], data[0], atol=1e-3)


def test_solver_options_do_not_change_the_data(data: tuple[Array, Array]) -> None:
    from petsc4py import PETSc

    options = PETSc.Options()
    options["ts_adapt_type"], options["ts_arkimex_type"], options["ksp_type"] = "none", "1bee", "gmres"
    try:
        assert np.array_equal(generate(problem_config())[0], data[0])
    finally:
        del options["ts_adapt_type"], options["ts_arkimex_type"], options["ksp_type"]
