"""The data of the Robertson problem on one rank: scaled by the trajectories to learn from, the others held out."""

import numpy as np
import pytest
import torch

from pnode_dist import Mesh
from pnode_dist.problems.robertson.data import RobertsonData, generate, partitions, sample_times
from tests.unit.problems.robertson.plain_robertson import (
    LOG_TIMES,
    TIMES,
    TRAINING,
    VALIDATION,
    by_radau,
    problem_config,
)


def computed(mesh: Mesh, **changes: object) -> RobertsonData:
    config = problem_config(**changes)
    return generate(config, *partitions(config, mesh), mesh)


@pytest.fixture(scope="module")
def data() -> RobertsonData:
    with Mesh() as mesh:
        return computed(mesh)


def test_samples_are_those_of_the_paper() -> None:
    config = problem_config(times=40)
    np.testing.assert_allclose(sample_times(config), np.logspace(-5, 2, 40), rtol=1e-12)


def test_validation_begins_with_the_problem_as_it_is_posed(data: RobertsonData) -> None:
    found = data.physical(data.validation.values).numpy()
    assert found.shape == (TIMES, VALIDATION, 3)
    np.testing.assert_allclose(found[:, 0], by_radau(np.array([1.0, 0.0, 0.0]), 10.0**LOG_TIMES), rtol=1e-7, atol=1e-14)


def test_training_and_validation_have_no_trajectory_in_common(data: RobertsonData) -> None:
    first = torch.cat([data.training.values[0], data.validation.values[0]])
    distances = torch.cdist(first, first) + torch.eye(len(first))
    assert len(first) == TRAINING + VALIDATION
    assert distances.min() > 1e-3


def test_scaled_training_concentrations_reach_from_0_to_1(data: RobertsonData) -> None:
    values = data.training.values.flatten(0, 1)
    torch.testing.assert_close(values.amin(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(values.amax(0), torch.ones(3, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_rate_is_the_fastest_change_between_samples(data: RobertsonData) -> None:
    changes = np.abs(np.diff(data.training.values.numpy(), axis=0)) / np.diff(10.0**LOG_TIMES)[:, None, None]
    np.testing.assert_allclose(data.rate, changes.max(axis=(0, 1)), rtol=1e-10)


def test_what_is_held_out_does_not_change_what_is_learnt_from(data: RobertsonData, mesh: Mesh) -> None:
    more = computed(mesh, validation=VALIDATION + 1)
    assert torch.equal(more.training.values, data.training.values)
    for name in ("lowest", "width", "rate"):
        assert torch.equal(getattr(more, name), getattr(data, name))


def test_the_seed_chooses_the_trajectories(data: RobertsonData, mesh: Mesh) -> None:
    assert torch.equal(computed(mesh).training.values, data.training.values)
    other = computed(mesh, seed=1)
    assert not torch.allclose(other.training.values, data.training.values, atol=1e-3)


def test_solver_options_do_not_change_the_data(data: RobertsonData, mesh: Mesh) -> None:
    from petsc4py import PETSc

    options = PETSc.Options()
    options["ts_adapt_type"], options["ts_arkimex_type"], options["ksp_type"] = "none", "1bee", "gmres"
    try:
        assert torch.equal(computed(mesh).training.values, data.training.values)
    finally:
        del options["ts_adapt_type"], options["ts_arkimex_type"], options["ksp_type"]
