"""The preconditioner of all stages is made of one for a stage, also transposed and where a step is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pnode_dist import ConfigurationError, GridPartition, Mesh, NeuralODE, Trajectory, odeint
from pnode_dist.nn import Conv2d
from pnode_dist.ode.steppers.preconditioner import Approximate, UserPC
from tests.oracles.right_hand_sides import gradients, identical, random
from tests.unit.ode.steppers.test_batched import stepper_of

RATES = torch.tensor([1.0, 30.0, 900.0], dtype=torch.float64)
TIMES = [0.0, 0.1, 0.3]


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -RATES * u + torch.cos(t)


class Inverse:
    """The inverse of shift + RATES, for two samples."""

    def update(self, t: float, u: torch.Tensor, shift: float) -> None:
        self.diagonal = np.tile(shift + RATES.numpy(), 2)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        y.setArray(x.getArray(readonly=True) / self.diagonal)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self.apply(pc, x, y)


def solved(**keywords: Any) -> tuple[NeuralODE, tuple[torch.Tensor, ...]]:
    node = NeuralODE(decay, newton="petsc", **{"method": "radau5", "step_size": 0.1, **keywords})
    return node, gradients(lambda u: node(u, TIMES), random(2, 3), [])


def diagonal_operator(t: float, u: torch.Tensor, shift: float) -> PETSc.Mat:
    matrix = PETSc.Mat().createAIJ((6, 6), nnz=1, comm=PETSc.COMM_SELF)
    for row, rate in enumerate(RATES.tolist() * 2):
        matrix.setValue(row, row, shift + rate)
    matrix.assemble()
    return matrix


@pytest.mark.parametrize("method", ["gauss4", "gauss6", "radau3", "radau5"])
def test_exact_inverses_of_a_stage_leave_few_iterations_at_any_stiffness(method: str) -> None:
    # Three steps; each is one linear system, in two Newton iterations at most.
    node, found = solved(method=method, preconditioner="block", step_size=0.1)
    assert node.last_solve.linear_iterations <= 3 * 2 * 6
    assert node.last_solve.adjoint_linear_iterations <= 3 * 11
    _, wanted = solved(method=method, options={"ksp_rtol": 1e-12, "snes_rtol": 1e-12})
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["gauss4", "radau5"])
def test_it_inverts_the_triangle_of_stages_and_its_transpose(method: str) -> None:
    node, _ = solved(method=method, preconditioner="block", step_size=0.1)
    stepper = stepper_of(node)
    tableau, pc = stepper.tableau, stepper._preconditioner
    size = 6 * tableau.stages
    given, found = PETSc.Vec().createSeq(size), PETSc.Vec().createSeq(size)

    def columns(apply: Callable[[Any, PETSc.Vec, PETSc.Vec], None]) -> torch.Tensor:
        made = []
        for unit in np.eye(size):
            given.setArray(unit)
            apply(None, given, found)
            made.append(torch.tensor(found.getArray()))
        return torch.stack(made, dim=1)

    ones = torch.eye(6, dtype=torch.float64)
    stiff = torch.kron(torch.eye(tableau.stages, dtype=torch.float64), torch.diag(RATES.repeat(2)))
    wanted = torch.linalg.inv(torch.kron(10 * tableau.triangle, ones) + stiff)
    torch.testing.assert_close(columns(pc.apply), wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(columns(pc.applyTranspose), wanted.T, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "preconditioner", [UserPC(Inverse()), Approximate(diagonal_operator)], ids=["Python PC", "Mat"]
)
def test_a_preconditioner_of_the_user_s_is_that_of_a_stage(preconditioner: Any) -> None:
    node, found = solved(preconditioner=preconditioner)
    block, wanted = solved(preconditioner="block")
    assert node.last_solve.linear_iterations == block.last_solve.linear_iterations
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14)


def test_a_mass_matrix_is_in_the_triangle_as_well() -> None:
    mass = torch.tensor([[2.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    u0 = torch.zeros(2, 3, dtype=torch.float64)
    u0[:, 1] = 1.0
    node = NeuralODE(decay, method="gauss6", step_size=0.1, mass=mass, preconditioner="block")
    other = NeuralODE(decay, method="gauss6", step_size=0.1, mass=mass, newton="batch")
    torch.testing.assert_close(node(u0, TIMES), other(u0, TIMES), rtol=1e-7, atol=1e-9)
    assert node.last_solve.linear_iterations <= 3 * 2 * 8


def test_a_recomputed_step_has_the_same_bits_with_a_preconditioner() -> None:
    def nonlinear(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -RATES * (u + u**3) + torch.cos(t)

    def gradient(trajectory: Trajectory) -> tuple[torch.Tensor, ...]:
        node = NeuralODE(nonlinear, method="gauss4", step_size=0.05, preconditioner="block", trajectory=trajectory)
        return gradients(lambda u: node(u, TIMES), random(2, 3), [])

    wanted = gradient(Trajectory(keep="graph"))
    assert identical(gradient(Trajectory(keep="stages")), wanted)
    assert identical(gradient(Trajectory(ram_slots=1)), wanted)


def test_an_assembled_jacobian_takes_petsc_s_options_for_its_pc() -> None:
    with Mesh() as mesh:
        grid = GridPartition(mesh, (6, 5), channels=1, boundary="periodic")
        spread = Conv2d(grid, 1, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            spread.weight.copy_(torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).reshape(1, 1, 3, 3))
        u0 = random(6, 5, 1)

        def ends(**keywords: Any) -> tuple[torch.Tensor, int]:
            node = NeuralODE(
                lambda t, u: 100 * spread(u), method="radau3", step_size=0.1, partition=grid, params=[], **keywords
            )
            with torch.no_grad():
                return node(u0, [0.0, 0.1])[-1], node.last_solve.linear_iterations

        exact, few = ends(preconditioner="assembled", options={"pc_type": "lu"})
        rough, more = ends(preconditioner="assembled", options={"pc_type": "jacobi"})
        torch.testing.assert_close(rough, exact, rtol=1e-6, atol=1e-8)
        assert few <= 8 < more


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ksp_type": "preonly"}, r"^ksp_type = 'preonly': the preconditioner of coupled stages is not their inverse"),
        ({"pc_type": "jacobi"}, r"^pc_type = 'jacobi': .* keyword preconditioner, and there is none: must be 'none'"),
        ({"ksp_type": "gauss"}, "^petsc options: "),
        ({"ts_theta_theta": 0.5}, "^options: 'ts_theta_theta': nothing reads it with this method"),
        ({"ts_type": "irk"}, "^options: 'ts_type': choose the method by name"),
        ({"pc_factor_levels": 2}, "^options: 'pc_factor_levels': nothing reads it"),
    ],
)
def test_options_without_an_effect_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        odeint(decay, random(2, 3), TIMES, method="radau5", options=options, newton="petsc")
    assert "\n" not in str(caught.value)
