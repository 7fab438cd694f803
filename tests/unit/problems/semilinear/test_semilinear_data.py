"""The computed trajectories on one rank: those of another integrator, in units of the ones to learn from."""

from typing import Any

import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.semilinear.data import generate
from pnode_dist.problems.semilinear.equation import initial_state
from pnode_dist.problems.semilinear.problem import SemilinearProblem
from tests.unit.problems.semilinear.plain_semilinear import (
    CASES,
    POINTS,
    TIMES,
    TRAINING,
    VALIDATION,
    config,
    problem_config,
)
from tests.unit.problems.semilinear.plain_semilinear import trajectory as by_scipy


def computed(mesh: Mesh, name: str, **changes: Any) -> torch.Tensor:
    """All trajectories `[trajectory, time, point]`."""
    return generate(problem_config(name, **changes), mesh)


@pytest.mark.parametrize("name", CASES)
def test_the_trajectories_are_those_that_scipy_computes(mesh: Mesh, name: str) -> None:
    states = computed(mesh, name).numpy()
    assert states.shape == (TRAINING + VALIDATION, TIMES, POINTS)
    case, table = CASES[name], problem_config(name)
    times = np.append(0.0, case["spin_up"] + np.arange(TIMES) * case["interval"])
    for number, found in enumerate(states):
        initial = initial_state(table.equation, POINTS, 0, number)
        # The state changes by some tenths from sample to sample.
        assert np.abs(np.diff(found, axis=0)).max() > 0.1
        # At time 0 there are both the initial state and, without spin-up, the first sample.
        expected = by_scipy(name, initial, np.unique(times))[-TIMES:]
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-7)


def test_the_trajectories_to_learn_from_alone_set_the_scale(mesh: Mesh) -> None:
    few, more = (
        SemilinearProblem(config("burgers", problem={"validation": count}), mesh, torch.float64)
        for count in (VALIDATION, 3)
    )
    learnt = computed(mesh, "burgers")[:TRAINING]
    assert few.scale == more.scale == pytest.approx(np.sqrt((learnt.numpy() ** 2).mean()), rel=1e-12)
    torch.testing.assert_close(few.samples.values[..., 0] * few.scale, learnt, rtol=1e-14, atol=0)
    assert torch.equal(more.held_out.values[:VALIDATION], few.held_out.values)


def test_the_seed_chooses_the_trajectories(mesh: Mesh) -> None:
    assert torch.equal(computed(mesh, "burgers"), computed(mesh, "burgers"))
    assert not torch.equal(computed(mesh, "burgers", seed=1), computed(mesh, "burgers"))


def test_a_finer_grid_has_nearly_the_same_trajectories(mesh: Mesh) -> None:
    def error(points: int) -> float:
        coarse, fine = (computed(mesh, "kuramoto_sivashinsky", points=n) for n in (points, 2 * points))
        return float((fine[:, :, ::2] - coarse).abs().max())

    assert error(96) < 0.3 * error(48)


def test_solver_options_do_not_change_the_data(mesh: Mesh) -> None:
    expected = computed(mesh, "burgers")
    options = PETSc.Options()
    options["ts_adapt_type"], options["ts_arkimex_type"] = "none", "2c"
    try:
        assert torch.equal(computed(mesh, "burgers"), expected)
    finally:
        del options["ts_adapt_type"], options["ts_arkimex_type"]


def test_equations_that_cannot_be_integrated_are_refused(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pnode_dist.problems.semilinear.data._MOST_STEPS", 300)
    # Fronts far thinner than the distance of the points.
    with pytest.raises(
        ConfigurationError,
        match=r"^\[problem\]: the viscous Burgers equation on 36 points cannot be integrated beyond .*$",
    ):
        computed(mesh, "burgers", viscosity=1e-7, interval=10.0)
