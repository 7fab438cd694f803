"""A kept solver is used again for the very same objects with the same contents, and for nothing else."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from petsc4py import PETSc

from pnode_dist import NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.ode.rhs.split import MatrixFunction
from pnode_dist.ode.solver_key import Same

ONE = torch.ones(1, dtype=torch.float64)
TIMES = [0.0, 1.0]
MASSES = [4.0, 6.0, 4.0, 5.0, 6.0, 1.0, 3.0, 2.0, 7.0, 6.0] * 3


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -u


def by_hand(mass: float) -> float:
    """Ten steps of implicit Euler of m du/dt = -u from 1."""
    return (1 + 0.1 / mass) ** -10


def diagonal(*values: float) -> PETSc.Mat:
    mat = PETSc.Mat().createAIJ((len(values), len(values)), nnz=1, comm=PETSc.COMM_SELF)
    for row, value in enumerate(values):
        mat.setValue(row, row, value)
    mat.assemble()
    return mat


def test_a_mass_that_is_replaced_in_a_loop_is_the_one_that_is_solved_with() -> None:
    node = NeuralODE(decay, method="beuler", step_size=0.1)
    for mass in MASSES:
        # The tensor before it is gone now, and this one may have its place.
        node.mass = None
        node.mass = torch.tensor([mass], dtype=torch.float64)
        assert abs(node(ONE, TIMES)[-1].item() - by_hand(mass)) <= 1e-8
    assert round(by_hand(4.0), 3) == 0.781
    assert round(by_hand(6.0), 3) == 0.848


@pytest.mark.parametrize("kind", ["tensor", "square", "float32", "numpy", "mat"])
def test_a_mass_that_is_changed_in_place_is_taken_as_it_is(kind: str) -> None:
    tensor = torch.tensor([4.0], dtype=torch.float32 if kind == "float32" else torch.float64)
    masses: dict[str, Any] = {"square": tensor.view(1, 1), "numpy": tensor.numpy(), "mat": diagonal(4.0)}
    mass = masses.get(kind, tensor)
    node = NeuralODE(decay, method="beuler", step_size=0.1, mass=mass)
    for value in (4.0, 6.0, 5.0):
        if kind == "mat":
            mass.setValue(0, 0, value)
            mass.assemble()
        else:
            mass[...] = value
        assert abs(node(ONE, TIMES)[-1].item() - by_hand(value)) <= 1e-8


def test_the_backward_pass_is_of_the_mass_that_the_forward_pass_had() -> None:
    for mass in (torch.tensor([4.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64)):
        node = NeuralODE(decay, method="beuler", step_size=0.1, mass=mass)
        start = ONE.clone().requires_grad_()
        end = node(start, TIMES)[-1]
        mass.fill_(6.0)
        other = node(start, TIMES)[-1]
        for states, value in ((end, 4.0), (other, 6.0)):
            (found,) = torch.autograd.grad(states.sum(), start)
            assert abs(found.item() - by_hand(value)) <= 1e-8


@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
def test_a_backward_pass_after_a_solve_with_another_mass_is_of_its_own_forward_pass(keep: str) -> None:
    mass = torch.tensor([4.0], dtype=torch.float64)
    node = NeuralODE(decay, method="beuler", step_size=0.1, mass=mass, trajectory=Trajectory(ram="1MiB", keep=keep))
    u0 = ONE.clone().requires_grad_()
    end = node(u0, TIMES)[-1]
    mass.fill_(6.0)
    node(u0, TIMES)
    (found,) = torch.autograd.grad(end.sum(), u0)
    assert abs(found.item() - by_hand(4.0)) <= 1e-8


def test_a_mat_that_is_changed_before_the_backward_pass_is_an_error() -> None:
    mass = diagonal(4.0)
    node = NeuralODE(decay, method="beuler", step_size=0.1, mass=mass)
    end = node(ONE.clone().requires_grad_(), TIMES)[-1]
    mass.scale(2.0)
    with pytest.raises(RuntimeError, match="changed in place between the forward pass and its backward pass") as caught:
        end.sum().backward()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["beuler", "arkimex_l2", "rk4"])
def test_the_mat_of_a_linear_part_that_is_changed_in_place_is_taken_as_it_is(method: str) -> None:
    matrix = diagonal(-1.0, -2.0)
    func = SplitFunction(implicit=matrix, explicit=lambda t, u: torch.zeros_like(u))
    whole: Any = MatrixFunction(matrix) if method == "beuler" else func
    node = NeuralODE(whole, method=method, step_size=0.1)
    start = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for factor in (1.0, 3.0, 0.5):
        matrix.scale(factor)
        found = node(start, TIMES)
        wanted = odeint(whole, start, TIMES, method=method, step_size=0.1)
        rates = matrix.getDiagonal().array
        assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
        assert torch.allclose(found[-1].detach(), torch.exp(torch.from_numpy(rates)), rtol=0, atol=0.04)
        (gradient,) = torch.autograd.grad(found[-1].sum(), start)
        assert torch.allclose(gradient, found[-1].detach(), rtol=1e-9, atol=0)
    end = node(start, TIMES)[-1]
    matrix.scale(2.0)
    with pytest.raises(RuntimeError, match=r"PETSc\.Mat"):
        end.sum().backward()


class _Scaled:
    """A preconditioner of the user's own, by a factor that can be changed."""

    matrix = None

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def build(self, setting: Any) -> Any:
        return _Built(self.factor)


class _Built:
    matrix = None
    factors: ClassVar[list[float]] = []

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.context = self

    def update(self, point: Any, shift: float) -> None:
        _Built.factors.append(self.factor)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        x.copy(y)
        y.scale(self.factor)

    applyTranspose = apply  # noqa: N815


def test_a_preconditioner_whose_attributes_change_is_built_again() -> None:
    described = _Scaled(0.5)
    node = NeuralODE(decay, method="beuler", step_size=0.5, preconditioner=described)
    node(ONE, TIMES)
    described.factor = 0.25
    node(ONE, TIMES)
    assert _Built.factors[0] == 0.5
    assert _Built.factors[-1] == 0.25


def test_solvers_are_kept_for_masses_that_stay_as_they_are() -> None:
    masses = torch.tensor([4.0], dtype=torch.float64), torch.tensor([6.0], dtype=torch.float64)
    node = NeuralODE(decay, method="beuler", step_size=0.1)
    for mass in masses * 3:
        node.mass = mass
        node(ONE, TIMES)
    assert len(node._solvers._solvers) == 2


def test_a_key_holds_what_it_is_made_of() -> None:
    held = {Same(torch.zeros(1)): number for number in range(50)}
    assert len(held) == 50
    assert Same(torch.zeros(1)) not in held
    assert all(Same(key.held) in held for key in held)
