from __future__ import annotations

import math

import petsc4py
import pytest
import torch
from torch import nn

from pnode_dist import BatchPartition, Mesh
from pnode_dist.verify import methods
from pnode_dist.verify.gradcheck import GradcheckCase, extrapolate, gradcheck, orders, state_direction


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is wrong by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * ctx.factor, None


def make_case(mesh: Mesh, state_factor: float = 1.0, parameter_factor: float = 1.0) -> GradcheckCase:
    partition = BatchPartition(mesh, 5, (2,))
    state = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2).requires_grad_()
    weight = nn.Parameter(torch.tensor([0.3, -1.2], dtype=torch.float64))

    def loss(u: torch.Tensor) -> torch.Tensor:
        return torch.sin(Scaled.apply(u, state_factor) * Scaled.apply(weight, parameter_factor)).exp().sum()

    return GradcheckCase(state, loss, [weight], partition)


def test_a_right_gradient_passes_with_nine_digits_and_second_order(mesh):
    result = gradcheck(make_case(mesh), mesh, seed=3)

    assert result.failures() == []
    assert result.relative_error < 1e-9
    assert all(order == pytest.approx(2, abs=0.1) for order in result.taylor_orders)
    assert all(order == pytest.approx(1, abs=0.1) for order in result.taylor_orders_without_gradient)
    assert len(result.taylor_orders) == 5


def test_loss_and_gradient_norm_over_state_and_parameters_are_those_of_torch(mesh):
    case = make_case(mesh)
    loss = case.loss(case.state)
    gradients = torch.autograd.grad(loss, [case.state, *case.parameters])

    result = gradcheck(case, mesh)

    assert result.loss == loss.item()
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    assert result.gradient_norm == pytest.approx(norm, rel=1e-15)
    assert (result.parameters, result.state_size, result.ranks) == (2, 10, 1)


@pytest.mark.parametrize("part", ["state_factor", "parameter_factor"])
def test_a_gradient_that_is_wrong_by_a_tenth_is_caught_by_both_tests(mesh, part):
    result = gradcheck(make_case(mesh, **{part: 1.1}), mesh)

    assert len(result.failures()) == 2
    assert result.failures()[0].startswith("relative_error = ")
    assert "is above 1e-06" in result.failures()[0]
    assert result.failures()[1].startswith("the second Taylor order = ")
    assert "is below 1.9" in result.failures()[1]


@pytest.mark.parametrize("part", ["state_factor", "parameter_factor"])
def test_a_gradient_that_is_wrong_by_a_hundred_thousandth_is_caught(mesh, part):
    result = gradcheck(make_case(mesh, **{part: 1.00001}), mesh)

    assert result.failures()[0].startswith("relative_error = ")


def test_a_gradient_that_is_not_a_number_is_caught(mesh):
    result = gradcheck(make_case(mesh, state_factor=math.nan), mesh)

    assert result.failures()[0] == "relative_error = nan is above 1e-06"


def test_the_check_leaves_state_and_parameters_as_they_were(mesh):
    case = make_case(mesh)
    before = [value.detach().clone() for value in (case.state, *case.parameters)]

    gradcheck(case, mesh)

    assert all(torch.equal(a, b) for a, b in zip(before, (case.state, *case.parameters), strict=True))


def test_a_loss_that_is_linear_along_the_direction_has_no_order_and_passes(mesh):
    partition = BatchPartition(mesh, 4, ())
    state = torch.ones(4, dtype=torch.float64, requires_grad=True)
    case = GradcheckCase(state, lambda u: 3 * u.sum(), [], partition)

    result = gradcheck(case, mesh)

    assert result.taylor_orders == [None] * 5
    assert result.failures() == []
    assert result.gradient_norm == 6.0


def test_a_parameter_that_the_loss_does_not_use_counts_as_zero(mesh):
    case = make_case(mesh)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    wider = GradcheckCase(case.state, case.loss, [*case.parameters, unused], case.partition)

    assert gradcheck(wider, mesh).gradient_norm == gradcheck(case, mesh).gradient_norm


def test_seeds_choose_different_directions_of_the_same_gradient(mesh):
    results = [gradcheck(make_case(mesh), mesh, seed) for seed in (0, 1, 0)]

    assert results[0] == results[2]
    assert results[0].adjoint_derivative != results[1].adjoint_derivative
    assert results[0].gradient_norm == results[1].gradient_norm


def test_the_direction_of_a_state_has_unit_variance_and_no_two_equal_rows(mesh):
    direction = state_direction(BatchPartition(mesh, 300, (40,)), (2,), seed=0)

    assert direction.shape == (2, 300, 40)
    assert direction.std().item() == pytest.approx(1, abs=0.02)
    assert len({row.sum().item() for row in direction[0]}) == 300


def test_extrapolation_of_central_differences_reaches_rounding():
    steps = [2.0**-n for n in range(2, 8)]
    differences = [(math.exp(1 + h) - math.exp(1 - h)) / (2 * h) for h in steps]

    derivative, error = extrapolate(differences)

    assert derivative == pytest.approx(math.e, rel=1e-13)
    assert error < 1e-12


def test_extrapolation_passes_over_steps_that_are_too_long():
    # 1/x does not exist beyond the first of these steps.
    steps = [0.9 / 2**n for n in range(6)]
    differences = [(1 / (1 + h) - 1 / (1 - h)) / (2 * h) for h in steps]

    assert extrapolate([math.nan, *differences])[0] == pytest.approx(-1, rel=1e-6)


def test_orders_are_the_logarithms_of_ratios_and_none_near_rounding():
    assert orders([1.0, 0.25, 0.125, 1e-17], smallest=1e-10) == [2.0, 1.0, None]


def test_refused_adjoints_are_marked_and_are_no_failures(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(petsc4py, "__version__", "3.25.5")
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in ("beuler", "dirk_s212", "bdf")})
    rows = list(methods.check_methods(mesh))
    assert [row["adjoint"] for row in rows] == ["verified", "refused: needs PETSc 3.26", "none"]
    assert [row["gradient error"] is None for row in rows] == [False, True, True]
    assert methods.failures(rows) == []
