"""Segments of explicit steps as one compiled function, against the same steps uncompiled."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory
from pnode_dist.ode.steppers.step_rule import StepCallbacks
from tests import torch_releases
from tests.oracles.right_hand_sides import Network, distance, gradients, random

pytestmark = pytest.mark.slow  # torch.compile alone takes seconds to load
TIMES = [0.0, 0.5, 0.6, 1.0]
# Traces as the default backend does, without waiting for a C++ compiler.
BACKEND = "aot_eager"


def compared(func: nn.Module, u0: torch.Tensor, backend: str | bool = BACKEND, **settings: Any) -> float:
    """The distance of solution and gradients, compiled from uncompiled, without warnings of the compiled one."""
    parameters = list(func.parameters())
    settings = {"step_size": 0.05, **settings}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile")
        found, wanted = (
            gradients(lambda u, node=node: node(u, TIMES), u0, parameters)  # type: ignore[misc]
            for node in (NeuralODE(func, compile=backend, **settings), NeuralODE(func, **settings))
        )
    return distance(found, wanted)


@pytest.mark.parametrize(
    "method",
    [
        "rk4",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("euler", "dopri5", "tsit5", "bosh3", "dopri8")),
    ],
)
def test_compiled_steps_give_the_gradients_of_uncompiled_ones(method: str) -> None:
    assert compared(Network(), random(2, 3), method=method) <= 1e-14


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_every_level_and_budget_gives_the_same_gradient(keep: str) -> None:
    slots = {} if keep == "graph" else {"ram_slots": 2}
    budget = Trajectory(ram="1GiB", keep=keep, schedule="auto" if keep == "graph" else "revolve", **slots)
    assert compared(Network(), random(2, 3), trajectory=budget, step_size=0.004) <= 1e-13


@pytest.mark.nightly
def test_types_of_f_and_state_may_differ() -> None:
    network, u0 = Network(dtype=torch.float32), random(2, 3)
    assert compared(network, u0, compute_dtype=torch.float32) <= 1e-6
    assert compared(network, u0.float(), state_dtype=torch.float64) <= 1e-6


@pytest.mark.nightly
def test_gradients_with_respect_to_times_are_those_of_uncompiled_steps() -> None:
    network, u0 = Network(), random(2, 3)
    found = []
    for compile in (BACKEND, False):
        times = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
        states = NeuralODE(network, step_size=0.05, compile=compile)(u0, times)
        found.append(torch.autograd.grad(states.sin().sum(), times)[0])
    assert distance(*found) <= 1e-13


class Pair(nn.Module):
    """A right-hand side of a tuple, with an extra argument and a tensor in its closure."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: torch.Tensor, state: Any, scale: torch.Tensor) -> Any:
        position, velocity = state
        return velocity.expand_as(position) * scale, -self.rate * position.sum(-1, keepdim=True) + t


@pytest.mark.nightly
def test_tuples_and_extra_arguments_are_compiled() -> None:
    pair, parts = Pair(), (random(2, 3), random(2, 1))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    found = []
    for compile in (BACKEND, False):
        node = NeuralODE(pair, step_size=0.05, last_only=True, compile=compile)
        start = tuple(part.clone().requires_grad_() for part in parts)
        position, velocity = node(start, [0.0, 1.0], scale)
        loss = position.sin().sum() + velocity.square().sum()
        found.append(torch.autograd.grad(loss, (*start, pair.rate, scale)))
    assert distance(*found) <= 1e-13


@pytest.mark.nightly
def test_one_compilation_serves_every_number_of_steps() -> None:
    from torch._dynamo.utils import counters

    node, u0 = NeuralODE(Network(), step_size=0.05, compile=BACKEND), random(2, 3)
    counters.clear()
    for end in (0.5, 1.0, 0.15, 2.85):
        gradients(lambda u, end=end: node(u, [0.0, end]), u0, list(node.parameters()))  # type: ignore[misc]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.nightly
def test_generated_code_takes_single_steps_between_outputs() -> None:
    assert compared(Network(), random(2, 3), True, step_size=0.5) <= 1e-14


def test_after_precompile_solves_compile_nothing() -> None:
    from torch._dynamo.utils import counters

    budget = Trajectory(ram="1GiB", ram_slots=1, keep="solution")
    node, u0 = NeuralODE(Network(), step_size=0.01, trajectory=budget, compile=BACKEND), random(2, 3)
    node.precompile(u0, [0.0, 1.0])
    counters.clear()
    gradients(lambda u: node(u, [0.0, 2.0]), u0, list(node.parameters()))
    assert node.last_solve.recomputed_steps > 0
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.nightly
def test_the_steps_are_counted_as_uncompiled_ones_are() -> None:
    counts = []
    for compile in (BACKEND, False):
        node = NeuralODE(Network(), step_size=0.05, compile=compile)
        gradients(lambda u, node=node: node(u, TIMES), random(2, 3), list(node.parameters()))  # type: ignore[misc]
        counts.append({name: count for name, count in vars(node.last_solve).items() if name != "graph_bytes"})
    assert counts[0] == counts[1]


class Energy(nn.Module):
    """Minus the gradient of an energy with respect to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            if not u.requires_grad:
                u = u.detach().requires_grad_()
            energy = self.network(t, u).square().sum()
            return -torch.autograd.grad(energy, u, create_graph=True)[0]


@torch_releases.tracing_derivatives
def test_a_func_that_differentiates_inside_is_compiled() -> None:
    assert compared(Energy(), random(2, 3)) <= 1e-13


class Dropped(Network):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(t, u), 0.5)


class Numpy(Network):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        factor = 1.0 + float(np.float64(u.detach().sum().item()) * 0.0)
        return super().forward(t, u) * factor


class OfItsParameters(Network):
    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            value = super().forward(t, u)
            (slope,) = torch.autograd.grad(value.square().sum(), self.bias, create_graph=True)
        return value + slope.sum()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Dropped, "func draws random numbers"),
        (Numpy, "torch.compile fails"),
        (OfItsParameters, "func differentiates with respect to its own parameters"),
    ],
)
def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(kind: type[Network], reason: str) -> None:
    network, u0 = kind(), random(2, 3)
    node = NeuralODE(network, step_size=0.1, compile=BACKEND)
    found = []
    for solve in (node, NeuralODE(network, step_size=0.1)):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(gradients(lambda u, solve=solve: solve(u, TIMES), u0, list(network.parameters())))  # type: ignore[misc]
        of_compile = [str(warning.message) for warning in caught if "compile: steps" in str(warning.message)]
        assert len(of_compile) == (solve is node)
        assert all(reason in message for message in of_compile)
    assert distance(*found) <= 1e-13
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node(u0, TIMES)


@pytest.mark.parametrize("gradient", [True, False])
def test_a_func_that_writes_into_its_state_is_an_error_in_compiled_steps_too(gradient: bool) -> None:
    class Writing(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            u.mul_(0.5)
            return super().forward(t, u)

    u0 = random(2, 3)
    before = u0.clone()
    with torch.set_grad_enabled(gradient), pytest.raises(RuntimeError, match="changed its state u"):
        NeuralODE(Writing(), step_size=0.1, compile=BACKEND)(u0, TIMES)
    assert torch.equal(u0, before)


def test_a_func_that_counts_its_calls_counts_all_of_them() -> None:
    class Counting(Network):
        calls = 0

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(t, u)

    network = Counting()
    node = NeuralODE(network, step_size=0.1, compile=BACKEND)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="changes tensors or attributes"):
        node(random(2, 3), [0.0, 1.0])
    network.calls = 0
    with torch.no_grad():
        node(random(2, 3), [0.0, 1.0])
    assert network.calls == 40


@pytest.mark.nightly
def test_a_func_with_too_many_versions_goes_on_as_it_is() -> None:
    class Versions(Network):
        kind = "0"

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return super().forward(t, u) * (1.0 + 0.1 * len(self.kind))

    network, u0 = Versions(), random(2, 3)
    parameters = list(network.parameters())
    node, plain = NeuralODE(network, step_size=0.1, compile=BACKEND), NeuralODE(network, step_size=0.1)
    told = 0
    for number in range(1, 12):
        network.kind = "0" * number
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = gradients(lambda u: node(u, TIMES), u0, parameters)
        told += sum("no longer compiled" in str(warning.message) for warning in caught)
        assert distance(found, gradients(lambda u: plain(u, TIMES), u0, parameters)) <= 1e-13
    assert told == 1


def test_a_parameter_that_is_not_found_is_an_error_in_compiled_steps_too() -> None:
    class Hidden(nn.Module):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return -held[0]["rate"].value * u

    class Holder:
        __slots__ = ("value",)

    holder = Holder()
    holder.value = torch.ones((), dtype=torch.float64, requires_grad=True)  # type: ignore[attr-defined]
    held = [{"rate": holder}]
    u0 = random(2, 3).requires_grad_()
    with pytest.raises(ValueError, match="was not found among its parameters"):
        NeuralODE(Hidden(), step_size=0.1, compile=BACKEND)(u0, TIMES)


@pytest.mark.nightly
def test_changed_parameters_and_attributes_are_seen_by_compiled_steps() -> None:
    class Scaled(Network):
        scale = 1.0

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return self.scale * super().forward(t, u)

    network, u0 = Scaled(), random(2, 3)
    node, plain = NeuralODE(network, step_size=0.1, compile=BACKEND), NeuralODE(network, step_size=0.1)
    node(u0, TIMES)
    with torch.no_grad():
        network.bias += 1.0
    assert distance(node(u0, TIMES).detach(), plain(u0, TIMES).detach()) <= 1e-14
    network.scale = 2.0
    assert distance(node(u0, TIMES).detach(), plain(u0, TIMES).detach()) <= 1e-14


@pytest.mark.nightly
def test_callbacks_see_every_step_of_compiled_solves() -> None:
    from dataclasses import replace

    from pnode_dist.ode.differentiable_solve import differentiable_solve
    from pnode_dist.ode.kept_solvers import NoSolvers

    seen: list[float] = []
    node = NeuralODE(Network(), step_size=0.1, compile=BACKEND)
    callbacks = StepCallbacks(step=lambda time, state, size: seen.append(float(time)))
    settings = replace(node._asked, callbacks=callbacks)
    differentiable_solve(NoSolvers(), NoSolvers(), node.func, random(2, 3), [0.0, 1.0], settings, ())
    assert seen == pytest.approx([0.1 * step for step in range(10)])


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_tanh_of_compiled_steps_is_as_accurate_as_torch_s(dtype: torch.dtype) -> None:
    from pnode_dist.ode.rhs.compiled import Compiler

    compiled = Compiler("inductor").compile(lambda x: torch.tanh(x), torch.device("cpu"), lambda backend: backend)
    magnitudes = torch.logspace(-300 if dtype is torch.float64 else -37, 3, 4000, dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, math.inf, -math.inf, math.nan])]).to(dtype)
    found, wanted = compiled(x).double(), torch.tanh(x.double())
    error = ((found - wanted).abs() / wanted.abs().clamp_min(torch.finfo(dtype).tiny)).nan_to_num()
    assert error.max() <= 4 * torch.finfo(dtype).eps
    assert found[-1].isnan()
    assert torch.equal(found[-3:-1], torch.tensor([1.0, -1.0], dtype=torch.float64))


@pytest.mark.nightly
@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_generated_code_gives_the_gradients_of_uncompiled_steps(keep: str) -> None:
    slots = {} if keep == "graph" else {"ram_slots": 2}
    budget = Trajectory(ram="1GiB", keep=keep, schedule="auto" if keep == "graph" else "revolve", **slots)
    assert compared(Network(), random(2, 3), True, trajectory=budget, step_size=0.004) <= 1e-13
