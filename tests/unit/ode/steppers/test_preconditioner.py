"""Preconditioners: what they save, that they are transposed for the adjoint, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist import ConfigurationError, GridPartition, NeuralODE
from pnode_dist.nn import Conv2d
from pnode_dist.ode.steppers.preconditioner import Approximate, AssembledJacobian, UserPC
from tests.oracles.right_hand_sides import random

TIGHT = {"snes_rtol": 1e-12, "snes_stol": 1e-15, "ksp_rtol": 1e-12}
TIMES = [0.0, 0.3]


class Stiff(torch.nn.Module):
    """Samples of a system that is stiff, nonlinear, and not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
        self.rates = torch.nn.Parameter(torch.tensor([1.0, 50.0, 2000.0], dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.layers(u) - self.rates * (u - u.roll(1, -1).sin())


def gradients(node: NeuralODE, u0: torch.Tensor) -> list[torch.Tensor]:
    u0 = u0.clone().requires_grad_()
    loss = node(u0, TIMES)[-1].pow(3).sum()
    return list(torch.autograd.grad(loss, [u0, *node.func.parameters()]))


def assert_near(found: list[torch.Tensor], wanted: list[torch.Tensor], rtol: float = 1e-9) -> None:
    for value, other in zip(found, wanted, strict=True):
        assert torch.allclose(value, other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("method", ["cn", "beuler", "arkimex_3", "dirk_es213sal", "radau5"])
def test_the_inverse_of_each_sample_leaves_few_iterations_forward_and_transposed(method: str) -> None:
    u0 = random(40, 3)
    plain = NeuralODE(Stiff(), method=method, step_size=0.05, options=TIGHT)
    block = NeuralODE(Stiff(), method=method, step_size=0.05, options=TIGHT, preconditioner="block")
    assert_near(gradients(block, u0), gradients(plain, u0))
    with_it, without = block.last_solve, plain.last_solve
    assert 2 * with_it.linear_iterations < without.linear_iterations
    assert 2 * with_it.adjoint_linear_iterations < without.adjoint_linear_iterations


def test_blocks_take_the_mass_matrix_and_the_parts_of_a_tuple_into_account() -> None:
    mass = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    u0 = random(5, 3)
    nodes = [
        NeuralODE(Stiff(), method="cn", step_size=0.1, options=TIGHT, mass=mass, preconditioner=kind)
        for kind in ("block", None)
    ]
    assert_near(gradients(nodes[0], u0), gradients(nodes[1], u0))
    assert nodes[0].last_solve.linear_iterations < nodes[1].last_solve.linear_iterations
    f = Stiff()

    def parts(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rates = f(t, torch.cat(u, -1))
        return rates[:, :1], rates[:, 1:]

    whole = NeuralODE(f, method="cn", step_size=0.1, options=TIGHT, preconditioner="block")
    split = NeuralODE(parts, method="cn", step_size=0.1, options=TIGHT, preconditioner="block")
    states = split((u0[:, :1], u0[:, 1:]), TIMES)
    assert torch.allclose(torch.cat(states, -1), whole(u0, TIMES), rtol=1e-10)
    assert split.last_solve.linear_iterations == whole.last_solve.linear_iterations


class Diffusion(torch.nn.Module):
    """A convolution that smooths, and a pointwise reaction."""

    def __init__(self, grid: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.mix = Conv2d(grid, 2, 2, dtype=torch.float64)
        stencil = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        with torch.no_grad():
            self.mix.weight.mul_(0.1)
            for channel in range(2):
                self.mix.weight[channel, channel] += 100 * stencil

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.mix(u) - u**3


@pytest.mark.parametrize("pc", ["lu", "ilu", "gamg"])
def test_the_assembled_jacobian_serves_any_preconditioner_of_petsc(pc: str) -> None:
    grid = GridPartition(MPI.COMM_SELF, (8, 10), channels=2, boundary=("replicate", "periodic"))
    u0 = random(8, 10, 2)
    plain = NeuralODE(Diffusion(grid), method="cn", step_size=0.1, options=TIGHT, partition=grid)
    assembled = NeuralODE(
        Diffusion(grid),
        method="cn",
        step_size=0.1,
        options={**TIGHT, "pc_type": pc},
        partition=grid,
        preconditioner=AssembledJacobian(width=1),
    )
    assert_near(gradients(assembled, u0), gradients(plain, u0))
    assert 2 * assembled.last_solve.linear_iterations < plain.last_solve.linear_iterations
    assert 2 * assembled.last_solve.adjoint_linear_iterations < plain.last_solve.adjoint_linear_iterations


def test_an_operator_and_a_pc_of_the_user_s_own_are_used() -> None:
    rates = Stiff().rates.detach()
    u0 = random(4, 3)

    def operator(t: float, u: torch.Tensor, shift: float) -> PETSc.Mat:
        matrix = PETSc.Mat().createAIJ((12, 12), nnz=1, comm=MPI.COMM_SELF)
        for row in range(12):
            matrix.setValue(row, row, shift + float(rates[row % 3]))
        matrix.assemble()
        return matrix

    class Jacobi:
        diagonal: Any = None

        def update(self, t: float, u: torch.Tensor, shift: float) -> None:
            self.diagonal = (shift + rates).repeat(4).numpy()

        def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
            y.array[:] = x.array_r / self.diagonal

        def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
            self.apply(pc, x, y)

    wanted = NeuralODE(Stiff(), method="cn", step_size=0.1, options=TIGHT)
    expected = gradients(wanted, u0)
    for own in (Approximate(operator), UserPC(Jacobi())):
        options = {**TIGHT, "pc_type": "jacobi"} if isinstance(own, Approximate) else TIGHT
        node = NeuralODE(Stiff(), method="cn", step_size=0.1, options=options, preconditioner=own)
        assert_near(gradients(node, u0), expected)
        assert node.last_solve.linear_iterations < wanted.last_solve.linear_iterations


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigurationError, match=r"preconditioner = 'ilu': must be one of none, block, assembled"):
        NeuralODE(Stiff(), method="cn", preconditioner="ilu")(random(2, 3), TIMES)
    with pytest.raises(ConfigurationError, match="needs a state that is one tensor on a GridPartition"):
        NeuralODE(Stiff(), method="cn", preconditioner="assembled")(random(2, 3), TIMES)
    with pytest.raises(ConfigurationError, match=r"preconditioner: method = 'rk4' is explicit and solves no equations"):
        NeuralODE(Stiff(), method="rk4", preconditioner="block")(random(2, 3), TIMES)
    with pytest.raises(ConfigurationError, match="must have an axis"):
        NeuralODE(lambda t, u: -u, method="cn", preconditioner="block")(random(1)[0], TIMES)
