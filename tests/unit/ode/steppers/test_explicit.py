"""Explicit steps: the same as PETSc's own, and not led astray by what memory f returns its values in."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pnode_dist import Trajectory, odeint
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.steppers.base import options_database

EXPLICIT = [method for method in METHODS.values() if method.family == "rk"]
SIZE, STEP = 4, 0.1
MATRIX = torch.linspace(-1.0, 1.0, SIZE * SIZE, dtype=torch.float64).view(SIZE, SIZE)
START = torch.linspace(0.3, 1.2, SIZE, dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def func(t: torch.Tensor | float, u: torch.Tensor) -> torch.Tensor:
    return torch.tanh(MATRIX @ u) * (1 + t) - 0.3 * u


def petsc_step(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The state after one TSStep from time 0, and what TSAdjointStep makes of WEIGHTS, through a dense Jacobian."""
    comm = PETSc.COMM_SELF
    solution, adjoint = (PETSc.Vec().createSeq(SIZE, comm=comm) for _ in range(2))
    solution.setArray(START.numpy())
    jacobian = PETSc.Mat().createDense((SIZE, SIZE), comm=comm)
    jacobian.setUp()

    def function(ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        f.setArray(func(t, torch.from_numpy(u.array_r.copy())).numpy())

    def derivative(ts: PETSc.TS, t: float, u: PETSc.Vec, a: PETSc.Mat, p: PETSc.Mat) -> None:
        by_state = torch.autograd.functional.jacobian(lambda v: func(t, v), torch.from_numpy(u.array_r.copy()))
        a.setValues(range(SIZE), range(SIZE), by_state.numpy())
        a.assemble()

    ts = PETSc.TS().create(comm=comm)
    ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
    ts.setType(PETSc.TS.Type.RK)
    ts.setRKType(name)
    ts.setRHSFunction(function, solution.duplicate())
    ts.setRHSJacobian(derivative, jacobian, jacobian)
    ts.setTimeStep(STEP)
    ts.setMaxSteps(1)
    ts.setMaxTime(10.0)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
    ts.setSaveTrajectory()
    with options_database({"ts_adapt_type": "none", "ts_trajectory_type": "memory"}):
        ts.setFromOptions()
    ts.solve(solution)
    adjoint.setArray(WEIGHTS.numpy())
    ts.setCostGradients([adjoint])
    ts.adjointSolve()
    return solution.getArray().copy(), adjoint.getArray().copy()


@pytest.mark.parametrize("method", EXPLICIT, ids=lambda method: method.name)
def test_a_step_and_its_adjoint_are_petsc_s_own_to_rounding(method: object) -> None:
    name = method.petsc_name  # type: ignore[attr-defined]
    state, adjoint = petsc_step(name)
    start = START.clone().requires_grad_()
    end = odeint(func, start, [0.0, STEP], method=name)[-1]
    (found,) = torch.autograd.grad(end, start, WEIGHTS)
    np.testing.assert_allclose(end.detach().numpy(), state, rtol=2e-15, atol=2e-15)
    np.testing.assert_allclose(found.numpy(), adjoint, rtol=2e-14, atol=2e-14)


BUFFER = torch.empty(SIZE, dtype=torch.float64)


def refilled(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.mul(torch.tanh(MATRIX @ u), 1 + t, out=BUFFER)


def fresh(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.tanh(MATRIX @ u) * (1 + t)


FIXED, ADAPTIVE = {"step_size": STEP}, {"rtol": 1e-6}


@pytest.mark.parametrize(
    ("method", "control"),
    [("euler", FIXED), ("heun", FIXED), ("rk4", FIXED), ("dopri5", FIXED), ("heun", ADAPTIVE), ("dopri5", ADAPTIVE)],
)
def test_f_may_fill_the_same_buffer_at_every_evaluation(method: str, control: dict[str, float]) -> None:
    times = [0.0, 0.5, 1.0]
    with torch.no_grad():
        found, wanted = (odeint(f, START, times, method=method, **control) for f in (refilled, fresh))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("keep", ["solution", "graph", "auto"])
def test_f_may_fill_a_buffer_where_no_graph_is_asked_for(keep: str) -> None:
    def sparing(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return fresh(t, u) if torch.is_grad_enabled() else refilled(t, u)

    trajectory = Trajectory(ram="1MiB", keep=keep)
    starts = [START.clone().requires_grad_() for _ in range(2)]
    ends = [
        odeint(f, u, [0.0, 1.0], step_size=STEP, trajectory=trajectory)[-1]
        for f, u in zip((sparing, fresh), starts, strict=True)
    ]
    found, wanted = (torch.autograd.grad(end, start, WEIGHTS)[0] for end, start in zip(ends, starts, strict=True))
    assert torch.equal(*ends)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize(
    "view", [lambda u: u, lambda u: u.T, lambda u: u.flip(0).flip(0), lambda u: u.detach()], ids=["u", "T", "flip", "d"]
)
def test_f_may_return_a_view_of_its_state(view: Callable[[torch.Tensor], torch.Tensor], method: str) -> None:
    state = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    with torch.no_grad():
        found = odeint(lambda t, u: view(u), state, [0.0, 0.3], method=method, step_size=STEP)
        wanted = odeint(lambda t, u: view(u).clone(), state, [0.0, 0.3], method=method, step_size=STEP)
    assert torch.equal(found, wanted)


def test_f_may_return_a_parameter_itself() -> None:
    speed = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    start = torch.zeros(2, dtype=torch.float64)
    end = odeint(lambda t, u: speed, start, [0.0, 1.0], step_size=0.25)[-1]
    (found,) = torch.autograd.grad(end.sum(), speed)
    assert torch.equal(end, speed)
    assert torch.equal(found, torch.ones(2, dtype=torch.float64))


def test_steps_change_neither_the_initial_state_nor_earlier_outputs() -> None:
    start = START.clone()
    found = odeint(fresh, start, [0.0, 0.1, 0.2, 0.3])
    assert torch.equal(start, START)
    assert torch.equal(found[0], START)
    assert len({tuple(state.tolist()) for state in found}) == 4
    assert all(bool((later != earlier).any()) for earlier, later in pairwise(found))
