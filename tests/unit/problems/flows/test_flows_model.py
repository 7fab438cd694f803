"""Flows against plain torch, closed forms and torchdiffeq: densities, samples, charges and their gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import nn

from pnode_dist import NeuralODE
from pnode_dist.problems.flows.config import FlowsModelConfig
from pnode_dist.problems.flows.model import ContinuousFlow, FlowDynamics, Whitening, continuous_flow
from tests.unit.problems.flows.plain_flows import (
    STEPS,
    TIME,
    Field,
    density,
    leaves_of,
    rates,
    standard_normal,
    velocity,
)

SAMPLES = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 3)))
NOISE = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 3)))
WEIGHTS = torch.from_numpy(np.random.default_rng(2).normal(size=(7,)))


def flow(
    method: str = "rk4", step_size: float | None = TIME / STEPS, whitening: Whitening | None = None, **model: Any
) -> ContinuousFlow:
    config = FlowsModelConfig(hidden=(6, 5), time=TIME, **model)
    return continuous_flow(
        config,
        3,
        0,
        torch.float64,
        lambda dynamics: NeuralODE(dynamics, method=method, step_size=step_size, last_only=True),
        whitening,
    )


def field_of(model: ContinuousFlow) -> tuple[Field, list[torch.Tensor]]:
    """The velocity of a single flow in plain torch, and the leaves that it is made of."""
    (own,) = leaves_of(model)
    return lambda t, z: velocity(own, "tanh", t, z), list(own.values())


class Linear(nn.Module):
    """v = A z."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return z @ self.matrix.T

    def with_tangents(
        self, t: torch.Tensor, z: torch.Tensor, tangents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return z @ self.matrix.T, (tangents @ self.matrix.T).expand(-1, *z.shape)


MATRIX = torch.tensor([[0.3, -0.8, 0.1], [0.5, -0.2, 0.4], [0.0, 0.2, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["exact", "hutchinson"])
def test_rates_are_those_of_a_jacobian_by_autograd(noise: torch.Tensor | None) -> None:
    model = flow(kinetic=1.0, jacobian=1.0)
    field, _ = field_of(model)
    dynamics = model.solves[0].func
    state = (SAMPLES, WEIGHTS, WEIGHTS, WEIGHTS)
    with torch.no_grad():
        found = dynamics(torch.tensor(0.3, dtype=torch.float64), state, noise)
    for value, expected in zip(found, rates(field, 0.3, SAMPLES, noise), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("noise", [None, NOISE], ids=["exact", "hutchinson"])
def test_log_density_charges_and_gradients_are_those_of_plain_torch(noise: torch.Tensor | None) -> None:
    model = flow(kinetic=1.0, jacobian=1.0, flows=2)
    samples = SAMPLES.clone().requires_grad_()
    found = model(samples, noise)
    loss = ((found.log_density + 0.3 * found.charges[0] + 0.7 * found.charges[1]) * WEIGHTS).sum()
    gradients = torch.autograd.grad(loss, (samples, *model.parameters()))

    flows, start = leaves_of(model), SAMPLES.clone().requires_grad_()
    base, expected, kinetic, jacobian = density(flows, start, noise)
    torch.testing.assert_close(found.base, base, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.log_density, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.charges, (kinetic, jacobian), rtol=1e-12, atol=1e-13)
    whole = ((expected + 0.3 * kinetic + 0.7 * jacobian) * WEIGHTS).sum()
    leaves = [value for own in flows for value in own.values()]
    for value, wanted in zip(gradients, torch.autograd.grad(whole, (start, *leaves)), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


def test_a_linear_velocity_changes_the_log_density_by_its_trace_times_the_time() -> None:
    dynamics = FlowDynamics(Linear(MATRIX), 3)
    model = ContinuousFlow([dynamics], [NeuralODE(dynamics, method="dopri5", step_size=0.02, last_only=True)], TIME)
    found = model(SAMPLES)
    base = SAMPLES @ torch.linalg.matrix_exp(TIME * MATRIX).T
    torch.testing.assert_close(found.base, base, rtol=1e-10, atol=1e-11)
    expected = standard_normal(base) + TIME * torch.trace(MATRIX)
    torch.testing.assert_close(found.log_density, expected, rtol=1e-10, atol=1e-11)
    (gradient,) = torch.autograd.grad(found.log_density.sum(), dynamics.velocity.matrix)
    matrix = MATRIX.clone().requires_grad_()
    whole = standard_normal(SAMPLES @ torch.linalg.matrix_exp(TIME * matrix).T) + TIME * torch.trace(matrix)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.sum(), matrix)[0], rtol=1e-8, atol=1e-9)


def test_an_accurate_solve_is_that_of_torchdiffeq() -> None:
    model = flow("dopri5", 0.05)
    field, leaves = field_of(model)
    found = model(SAMPLES)
    gradients = torch.autograd.grad((found.log_density * WEIGHTS).sum(), tuple(model.parameters()))
    start = (SAMPLES, torch.zeros(7, dtype=torch.float64))
    z, change = torchdiffeq.odeint(
        lambda t, state: rates(field, t, state[0])[:2],
        start,
        torch.tensor([0.0, TIME], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-10,
    )
    expected = standard_normal(z[-1]) - change[-1]
    torch.testing.assert_close(found.log_density, expected, rtol=1e-8, atol=1e-9)
    for value, wanted in zip(gradients, torch.autograd.grad((expected * WEIGHTS).sum(), leaves), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-7, atol=1e-8)


def test_sampling_goes_the_way_back_with_the_same_densities() -> None:
    model = flow("dopri5", 0.05, flows=2)
    with torch.no_grad():
        found = model(SAMPLES)
        samples, log_density = model.sample(found.base)
    torch.testing.assert_close(samples, SAMPLES, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_density, found.log_density, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_hutchinson_s_estimates_are_right_in_the_mean(kind: str) -> None:
    generator, draws = np.random.default_rng(0), 40_000
    drawn = generator.normal(size=(draws, 3)) if kind == "gaussian" else 2.0 * generator.integers(0, 2, (draws, 3)) - 1
    dynamics = FlowDynamics(Linear(MATRIX), 3, ("jacobian",))
    zero = torch.zeros(draws, dtype=torch.float64)
    state = (torch.zeros(draws, 3, dtype=torch.float64), zero, zero)
    with torch.no_grad():
        _, change, norm = dynamics(torch.tensor(0.0), state, torch.from_numpy(drawn))
    for estimates, exact in ((-change, torch.trace(MATRIX)), (norm, MATRIX.square().sum())):
        error = 5 * estimates.std().item() / math.sqrt(draws)
        assert 1e-3 < error < 0.1
        assert estimates.mean().item() == pytest.approx(exact.item(), abs=error)


def test_a_whitened_flow_is_the_density_of_rows_that_were_white() -> None:
    factor, mean = torch.linalg.cholesky(MATRIX @ MATRIX.T), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    plain, whitened = flow(), flow(whitening=Whitening(mean, factor))
    rows = mean + SAMPLES @ factor.T
    with torch.no_grad():
        found, expected = whitened(rows), plain(SAMPLES)
        torch.testing.assert_close(found.base, expected.base, rtol=1e-12, atol=1e-12)
        volume = torch.linalg.slogdet(factor)[1]
        torch.testing.assert_close(found.log_density, expected.log_density - volume, rtol=1e-12, atol=1e-12)
        samples, log_density = whitened.sample(SAMPLES)
        ways, white = plain.sample(SAMPLES)
        torch.testing.assert_close(samples, mean + ways @ factor.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_density, white - volume, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whitened.paths(SAMPLES, STEPS)[-1], samples, rtol=1e-12, atol=1e-12)
    assert not list(whitened.whitening.parameters())


def test_paths_go_from_the_noise_through_every_flow_to_the_samples() -> None:
    model = flow(flows=2)
    with torch.no_grad():
        samples, _ = model.sample(SAMPLES)
        paths = model.paths(SAMPLES, STEPS)
        between = model.solves[1](model.start(SAMPLES), (TIME, 0.0))[0]
    assert paths.shape == (2 * STEPS + 1, 7, 3)
    assert torch.equal(paths[0], SAMPLES)
    torch.testing.assert_close(paths[STEPS], between, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(paths[-1], samples, rtol=1e-13, atol=1e-14)


def test_the_seed_fixes_parameters_that_differ_between_flows() -> None:
    first, again = flow(flows=2), flow(flows=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    one, other = (next(solve.parameters()) for solve in first.solves)
    assert not torch.equal(one, other)
    assert len(list(first.parameters())) == 2 * 3 * 5


def test_two_densities_before_a_backward_pass_keep_their_own_noise() -> None:
    model = flow()
    first, second = model(SAMPLES, NOISE), model(SAMPLES, -2 * NOISE)
    found = torch.autograd.grad(first.log_density.sum(), tuple(model.parameters()))
    expected = torch.autograd.grad(model(SAMPLES, NOISE).log_density.sum(), tuple(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(first.log_density, second.log_density)
