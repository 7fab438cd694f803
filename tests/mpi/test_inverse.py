"""Inverse problems at every number of ranks: values and derivatives are those of plain torch on the whole field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, DensePartition, GridPartition, Mesh, NeuralODE, SplitFunction
from pnode_dist.inverse import (
    Control,
    Covariance,
    Gaussian,
    GlobalMean,
    GridCovariance,
    Inverse,
    ModelError,
    NegativeLogPosterior,
    Observation,
    Points,
    Subsample,
    taylor_test,
)
from pnode_dist.nn import Conv2d, Linear
from tests.mpi.grids import block
from tests.oracles.assimilation import matern_root, states_at
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random
from tests.tiers import at_night

pytestmark = pytest.mark.mpi

SHAPE, STEP, START, JUMP, MEAN_AT, END = (5, 6), 0.1, 0.0, 0.2, 0.3, 0.5
BOUNDARY = ("replicate", "periodic")
POINTS = [[0.25, 5.5], [3.0, 2.75], [4.0, 0.0]]
DEVIATION, LENGTH, SPACING = 0.3, 0.5, (0.25, 0.2)
VARIANCES = (0.04, 0.01, 0.002)
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "snes_stol": 1e-15, "ksp_rtol": 1e-13}


class Flow(nn.Module):
    """du/dt = tanh(conv(u)) - rate u, on a partitioned grid or on a whole one."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.boundary = partition.boundary
        self.inner = Conv2d(partition, 2, 2, dtype=torch.float64)
        self.rate = nn.Parameter(torch.tensor([0.5, 0.8], dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(u)) - self.rate * u

    def whole(self, t: torch.Tensor, u: torch.Tensor, rate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(convolved(u[None], self.boundary, weight, self.inner.bias)[0]) - rate * u


@dataclass
class Problem:
    """A problem with all kinds of controls and observations, and the same function of whole tensors."""

    inverse: Inverse
    partition: GridPartition
    whole: Callable[..., torch.Tensor]
    tensors: list[torch.Tensor]

    def packed(self, whole: list[torch.Tensor]) -> Any:
        """The Vec of whole tensors: initial state, rate, weight and jump."""
        state, rate, weight, jump = whole
        parameters = torch.cat([rate.reshape(-1), weight.reshape(-1)])
        return self.inverse.space.pack([block(self.partition, state), parameters, block(self.partition, jump)])

    def difference(self, vec: Any, whole: list[torch.Tensor]) -> float:
        """The distance of a Vec from whole tensors, relative to their norm."""
        wanted = self.packed(whole)
        return float((vec - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def problem(mesh: Mesh) -> Problem:
    partition = GridPartition(mesh, SHAPE, 2, BOUNDARY)
    flow = Flow(partition)
    node = NeuralODE(flow, step_size=STEP, partition=partition)
    rate, weight = flow.rate.detach().clone(), flow.inner.weight.detach().clone()
    u0, mean = random(*SHAPE, 2), random(*SHAPE, 2, seed=4)
    sampled, points, average = random(2, 3, 2, 2, seed=5), random(3, 2, seed=6), random(1, 2, seed=7)
    subsample, at_points, global_mean = (
        Subsample(partition, (2, 3, 1)),
        Points(partition, POINTS),
        GlobalMean(partition),
    )
    observations = [
        Observation((START, JUMP), subsample, subsample.part_of(sampled), VARIANCES[0]),
        Observation(END, lambda u: at_points(u) ** 2, at_points.part_of(points), VARIANCES[1]),
        Observation(MEAN_AT, global_mean, global_mean.part_of(average), VARIANCES[2]),
    ]
    covariance = GridCovariance(partition, DEVIATION, LENGTH, SPACING)
    controls = [
        Control(block(partition, u0), prior=Gaussian(block(partition, mean), covariance)),
        Control([flow.rate, flow.inner.weight], prior=Gaussian(0.1, 0.5)),
    ]
    inverse = Inverse(node, controls, observations, model_error=ModelError([JUMP], 0.01))
    root = matern_root(SHAPE, [LENGTH / width for width in SPACING], [False, True]) * DEVIATION

    def whole(state: torch.Tensor, rate: torch.Tensor, weight: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
        def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return flow.whole(t, u, rate, weight)

        states = states_at(f, state, [START, JUMP, MEAN_AT, END], STEP, {JUMP: jump})
        seen = torch.stack([states[time][::2, ::3] for time in (START, JUMP)])
        misfits = [seen - sampled, interpolated(states[END]) ** 2 - points, states[MEAN_AT].mean((0, 1)) - average[0]]
        observed = sum(m.square().sum() / v for m, v in zip(misfits, VARIANCES, strict=True))
        inner = torch.linalg.solve(root, (state - mean).reshape(-1, 2)).square().sum()
        others = sum((p - 0.1).square().sum() for p in (rate, weight)) / 0.5
        return (observed + inner + others + jump.square().sum() / 0.01) / 2

    return Problem(inverse, partition, whole, [u0, rate, weight, random(*SHAPE, 2, seed=9) / 10])


def interpolated(field: torch.Tensor) -> torch.Tensor:
    """The field at `POINTS`, by hand."""
    return torch.stack(
        [
            0.75 * (field[0, 5] + field[0, 0]) / 2 + 0.25 * (field[1, 5] + field[1, 0]) / 2,
            field[3, 2] / 4 + 3 * field[3, 3] / 4,
            field[4, 0],
        ]
    )


def test_value_and_gradient_are_those_of_the_whole_field(problem: Problem) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in problem.tensors]
    wanted = problem.whole(*leaves)
    gradient = list(torch.autograd.grad(wanted, leaves))
    m = problem.packed(problem.tensors)
    assert problem.inverse(m) == pytest.approx(wanted.item(), rel=1e-12)
    assert problem.difference(problem.inverse.derivative(), gradient) <= 1e-11


def test_hessian_products_are_those_of_the_whole_field(problem: Problem) -> None:
    along = [random(*tensor.shape, seed=20 + number) for number, tensor in enumerate(problem.tensors)]
    _, wanted = torch.autograd.functional.hvp(problem.whole, tuple(problem.tensors), tuple(along))
    problem.inverse(problem.packed(problem.tensors))
    assert problem.difference(problem.inverse.hessian(problem.packed(along)), list(wanted)) <= 1e-10


def test_a_served_posterior_takes_and_gives_whole_fields(problem: Problem) -> None:
    model = NegativeLogPosterior(problem.inverse)
    state, rate, weight, jump = problem.tensors

    def whole(state: torch.Tensor, parameters: torch.Tensor, jump: torch.Tensor) -> torch.Tensor:
        own = torch.split(parameters, [rate.numel(), weight.numel()])
        return problem.whole(state.view(*SHAPE, 2), own[0].view_as(rate), own[1].view_as(weight), jump.view(*SHAPE, 2))

    inputs = [state.flatten(), torch.cat([rate.flatten(), weight.flatten()]), jump.flatten()]
    assert list(model.input_sizes({})) == [len(one) for one in inputs]
    leaves = [one.clone().requires_grad_() for one in inputs]
    wanted = whole(*leaves)
    gradients = torch.autograd.grad(wanted, leaves)
    assert distance(model.evaluate(inputs, {}), [wanted.reshape(1)]) <= 1e-12
    sens, along = torch.tensor([1.7], dtype=torch.float64), random(len(inputs[1]), seed=41)
    for number, gradient in enumerate(gradients):
        assert distance(model.gradient(0, number, inputs, sens, {}), 1.7 * gradient) <= 1e-11
    assert distance(model.apply_jacobian(0, 1, inputs, along, {}), (gradients[1] @ along).reshape(1)) <= 1e-11
    zeros = (torch.zeros_like(inputs[0]), along, torch.zeros_like(inputs[2]))
    _, products = torch.autograd.functional.hvp(whole, tuple(inputs), zeros)
    assert distance(model.apply_hessian(0, 0, 1, inputs, sens, along, {}), 1.7 * products[0]) <= 1e-10
    with pytest.raises(ConfigurationError, match="config: unknown key 'level': must be empty"):
        model.input_sizes({"level": 1})


def test_the_gauss_newton_matrix_is_that_of_the_residuals(problem: Problem) -> None:
    inverse, space = problem.inverse, problem.inverse.space
    m, v, w = problem.packed(problem.tensors), space.random(1), space.random(2)
    value = inverse(m)
    residual = inverse.residual()
    assert residual.dot(residual) / 2 == pytest.approx(value, rel=1e-12)
    pulled = inverse.residual_vjp(residual)
    gradient = inverse.derivative()
    assert (pulled - gradient).norm() <= 1e-12 * gradient.norm()
    product, other = inverse.gauss_newton(v), inverse.gauss_newton(w)
    assert product.dot(w) == pytest.approx(other.dot(v), rel=1e-10)
    step = 1e-5
    inverse(m + step * v)
    ahead = inverse.residual()
    inverse(m - step * v)
    slope = (ahead - inverse.residual()) * (0.5 / step)
    inverse(m)
    pushed = inverse.residual_jvp(v)
    assert (slope - pushed).norm() <= 1e-8 * pushed.norm()
    without = inverse.gauss_newton(v, prior=False) + inverse.prior.solve(v)
    assert (without - product).norm() <= 1e-12 * product.norm()


def test_a_vec_of_controls_counts_each_entry_once(problem: Problem) -> None:
    space = problem.inverse.space
    whole = [random(*tensor.shape, seed=30 + number) for number, tensor in enumerate(problem.tensors)]
    vec = problem.packed(whole)
    assert vec.getSize() == space.size == sum(tensor.numel() for tensor in whole)
    assert vec.dot(vec) == pytest.approx(sum(tensor.square().sum().item() for tensor in whole), rel=1e-13)
    state, parameters, jump = space.unpack(vec)
    assert torch.equal(state, block(problem.partition, whole[0]))
    assert torch.equal(parameters, torch.cat([whole[1].reshape(-1), whole[2].reshape(-1)]))
    assert torch.equal(jump, block(problem.partition, whole[3]))
    drawn = space.random(7)
    assert 0.5 < drawn.dot(drawn) / space.size < 1.5


class Stiff(nn.Module):
    """-k u^2 - 3 u, at each point alone."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.k * u**2 - 3 * u


def of_method(mesh: Mesh, method: str) -> tuple[Inverse, Any]:
    partition = GridPartition(mesh, SHAPE, 2, BOUNDARY)
    flow, stiff = Flow(partition), Stiff()
    split = method.startswith("arkimex")
    func: nn.Module = SplitFunction(implicit=stiff, explicit=flow) if split else flow
    options = None if method == "rk4" else TIGHT
    node = NeuralODE(func, method=method, step_size=STEP, partition=partition, options=options)
    observe = Points(partition, POINTS)
    data = observe.part_of(random(2, 3, 2, seed=6))
    controls = [
        Control(block(partition, random(*SHAPE, 2)), prior=Gaussian(0.0, 0.1)),
        Control([flow.rate, stiff.k] if split else flow.rate, prior=Gaussian(None, 0.1)),
    ]
    inverse = Inverse(node, controls, [Observation([MEAN_AT, END], observe, data, 0.01)])
    return inverse, inverse.space.guess()


@pytest.mark.parametrize("method", at_night(["rk4", "cn", "beuler", "arkimex_3"], but=["rk4"]))
def test_hessian_products_are_differences_of_gradients(method: str, mesh: Mesh) -> None:
    inverse, m = of_method(mesh, method)
    v, step = inverse.space.random(3), 1e-4
    inverse(m + step * v)
    ahead = inverse.derivative()
    inverse(m - step * v)
    wanted = (ahead - inverse.derivative()) * (0.5 / step)
    inverse(m)
    found = inverse.hessian(v)
    assert (found - wanted).norm() <= 1e-7 * found.norm()


@pytest.mark.parametrize("method", at_night(["rk4", "cn", "arkimex_3"], but=["rk4"]))
def test_taylor_remainders_are_of_first_second_and_third_order(method: str, mesh: Mesh) -> None:
    result = taylor_test(*of_method(mesh, method))
    assert result.failures() == []
    for degree in range(3):
        order = result.order(degree)
        assert order is not None
        assert order == pytest.approx(degree + 1, abs=0.1)


def test_a_wrong_hessian_fails_the_taylor_test(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    inverse, m = of_method(mesh, "rk4")
    exact = inverse.hessian
    monkeypatch.setattr(inverse, "hessian", lambda v: exact(v) * 1.1)
    assert [failure.split(":")[0] for failure in taylor_test(inverse, m).failures()] == ["Hessian"]


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_parameters_are_controls_also_if_they_are_sharded(shard: bool, mesh: Mesh) -> None:
    partition = DensePartition(mesh, 7)
    layer = Linear(partition, partition, bias=False, dtype=torch.float64, shard=shard)
    part_of = layer.parameter_shards["weight"].part_of if shard else torch.clone
    whole, u0, data = random(7, 7, seed=2) / 3, random(7, seed=1), random(7, seed=8)
    with torch.no_grad():
        layer.weight.copy_(part_of(whole))
    own = slice(*partition.owned)
    inverse = Inverse(
        NeuralODE(_Tanh(layer), step_size=STEP, partition=partition),
        [Control(layer.weight, prior=Gaussian(0.0, 2.0))],
        [Observation(END, None, data[own], 0.1)],
        u0=u0[own],
    )

    def misfit(weight: torch.Tensor) -> torch.Tensor:
        end = states_at(lambda t, u: torch.tanh(weight @ u), u0, [START, END], STEP)[END]
        return (end - data).square().sum() / 0.2 + weight.square().sum() / 4

    along = torch.from_numpy(np.random.default_rng([5, 0]).standard_normal((7, 7)))
    value, product = torch.autograd.functional.hvp(misfit, whole, along)
    gradient = torch.autograd.functional.jacobian(misfit, whole)
    assert inverse.space.size == 49
    assert inverse(inverse.space.guess()) == pytest.approx(value.item(), rel=1e-12)
    found = [inverse.derivative(), inverse.hessian(inverse.space.random(5))]
    for vec, wanted in zip(found, (gradient, product), strict=True):
        (part,) = inverse.space.unpack(vec)
        assert torch.allclose(part, part_of(wanted), rtol=1e-10, atol=1e-12)


class _Tanh(nn.Module):
    """tanh of a layer, as a right-hand side."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(u))


class Uneven(Covariance):
    """A covariance that returns another shape on the last rank."""

    def __init__(self, wrong: bool) -> None:
        self.wrong = wrong

    def root(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def root_solve(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1)[1:] if self.wrong else x


def test_a_mistake_of_one_rank_is_refused_on_all(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, 2, BOUNDARY)
    node = NeuralODE(Flow(partition), step_size=STEP, partition=partition)
    u0, last = block(partition, random(*SHAPE, 2)), mesh.rank == mesh.size - 1

    def refused(control: Control, observation: Observation, match: str) -> None:
        with pytest.raises(ConfigurationError, match=match):
            Inverse(node, [control], [observation])

    refused(Control(u0), Observation(END, None, u0[1:] if last else u0), "data have shape")
    refused(Control(u0), Observation(END, None, u0 / 0 if last else u0), "must be finite")
    refused(Control(u0, bounds=(torch.zeros(3) if last else 0.0, None)), Observation(END, None, u0), "bounds: shape")
    refused(Control(u0, prior=Gaussian(0.0, Uneven(last))), Observation(END, None, u0), r"prior\.covariance: its shape")
