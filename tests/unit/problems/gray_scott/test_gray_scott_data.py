"""The computed trajectories on one rank: those of another integrator, normalised by the ones to learn from."""

import numpy as np
import pytest
import torch

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.gray_scott.data import rate_of_change, trajectories
from pnode_dist.problems.gray_scott.problem import GrayScottProblem
from tests.unit.problems.gray_scott.plain_gray_scott import (
    NX,
    NY,
    TIMES,
    TRAINING,
    VALIDATION,
    config,
    normalisation,
    problem_config,
)
from tests.unit.problems.gray_scott.plain_gray_scott import trajectory as by_scipy


def computed(mesh: Mesh, **changes: object) -> torch.Tensor:
    """All trajectories `[trajectory, time, y, x, species]`."""
    return trajectories(problem_config(**changes), GridPartition(mesh, (NY, NX), 2, ("periodic", "periodic")))


def built(mesh: Mesh, **changes: object) -> GrayScottProblem:
    return GrayScottProblem(config(problem=changes), mesh, torch.float64)


def test_the_trajectories_are_those_that_scipy_computes(mesh: Mesh) -> None:
    states = computed(mesh).numpy()
    assert states.shape == (TRAINING + VALIDATION, TIMES, NY, NX, 2)
    for found in states:
        # Along the trajectory the state changes by some tenths.
        assert np.abs(found[-1] - found[0]).max() > 0.1
        np.testing.assert_allclose(found, by_scipy(found[0]), rtol=0, atol=1e-8)


def test_the_trajectories_to_learn_from_alone_set_the_normalisation(mesh: Mesh) -> None:
    problem, states = built(mesh, validation=3), computed(mesh, validation=3)
    mean, deviation, rate = normalisation(states[:TRAINING].numpy())
    for found, part in ((problem.samples, states[:TRAINING]), (problem.held_out, states[TRAINING:])):
        np.testing.assert_allclose(found.values, (part.numpy() - mean) / deviation, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(problem.physical(found.values), part, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(rate_of_change(problem.samples, mesh), rate, rtol=1e-12)
    assert torch.equal(states[: TRAINING + VALIDATION], computed(mesh))


def test_the_seed_chooses_the_trajectories(mesh: Mesh) -> None:
    assert torch.equal(computed(mesh), computed(mesh))
    assert not torch.equal(computed(mesh, seed=1), computed(mesh))


def test_solver_options_do_not_change_the_data(mesh: Mesh) -> None:
    from petsc4py import PETSc

    expected = computed(mesh)
    options = PETSc.Options()
    options["ts_adapt_type"], options["ts_rk_type"] = "none", "1fe"
    try:
        assert torch.equal(computed(mesh), expected)
    finally:
        del options["ts_adapt_type"], options["ts_rk_type"]


def test_equations_that_cannot_be_integrated_are_refused(mesh: Mesh) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^\[problem\]: .* beyond time 0: diffusion, feed or kill is too large$"
    ):
        computed(mesh, diffusion=(1e9, 1e9))


def test_a_grid_too_coarse_for_the_initial_states_is_refused(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def resting(partition: GridPartition, seed: int, number: int) -> torch.Tensor:
        return torch.tensor([1.0, 0.0], dtype=torch.float64).expand(partition.local_shape)

    monkeypatch.setattr("pnode_dist.problems.gray_scott.data.initial_state", resting)
    with pytest.raises(ConfigurationError, match=r"^\[problem\] shape = \[10, 13\]: too coarse: .*$"):
        built(mesh)
