"""Solves with known jumps of f, against plain torch that solves from jump to jump with smooth functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.ode.time_grid import divided
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.implicit import CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.2, 0.5, 0.7, 1.1, 1.3]
JUMPS = [-4.0, 0.2, 0.45, 0.7, 0.9, 1.3, 5.0]
INSIDE = [0.2, 0.45, 0.7, 0.9, 1.3]
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}


class Switched(nn.Module):
    """A network whose output is multiplied by another factor after each jump; `at` chooses the side at the jump."""

    def __init__(self, at: str = "after", jumps: Sequence[float] = INSIDE) -> None:
        super().__init__()
        self.network, self.at = Network(), at
        self.factors = nn.Parameter(torch.tensor([50.0, 1.0, -2.0, 3.0, 0.5, 70.0], dtype=torch.float64))
        self.register_buffer("jumps", torch.tensor(jumps, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        passed = (t >= self.jumps) if self.at == "after" else (t > self.jumps)
        return self.network(t, u) * self.factors.gather(0, passed.sum().reshape(1))

    def piece(self, number: int) -> Callable[..., torch.Tensor]:
        """The smooth function that `forward` is between two jumps."""
        return lambda t, u: self.network(t, u) * self.factors[number]


def piecewise(f: Switched, u: torch.Tensor, solve: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The outputs of `solve(f, u, times)` from jump to jump, at the times of `TIMES`."""
    found = [u]
    for number, (begin, end) in enumerate(pairwise(INSIDE), start=1):
        times = [begin, *(time for time in TIMES if begin < time < end), end]
        states = solve(f.piece(number), u, times)
        found += [state for state, time in zip(states[1:], times[1:], strict=True) if time in TIMES]
        u = states[-1]
    return torch.stack(found)


@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
@pytest.mark.parametrize(("method", "table"), [("rk4", "4"), ("dopri5", "5dp")])
def test_explicit_steps_are_those_of_solves_from_jump_to_jump(method: str, table: str, keep: str, at: str) -> None:
    f, u0 = Switched(at), random(2, 3)
    node = NeuralODE(f, method=method, step_size=0.08, jumps=JUMPS, trajectory=Trajectory(ram="1MiB", keep=keep))
    found = gradients(lambda u: node(u, TIMES), u0, list(f.parameters()))
    plain = gradients(
        lambda u: piecewise(f, u, lambda g, v, t: odeint_plain(g, v, t, TABLEAUX[table], 0.08)),
        u0,
        list(f.parameters()),
    )
    assert distance(found, plain) < 1e-12


@pytest.mark.parametrize("control", [{"step_size": 0.02}, {"rtol": 1e-7, "atol": 1e-9}], ids=["fixed", "control"])
@pytest.mark.parametrize(
    "budget",
    [
        Trajectory(ram_slots=1, keep="solution", schedule="revolve"),
        Trajectory(ram_slots=3, keep="solution", schedule="revolve"),
        Trajectory(ram_slots=2, disk="1MiB", keep="solution", schedule="multistage"),
    ],
    ids=["one slot", "three slots", "disk"],
)
def test_recomputed_steps_stay_on_their_side_of_a_jump(budget: Trajectory, control: dict[str, float]) -> None:
    f, u0 = Switched(), random(2, 3)
    few = NeuralODE(f, jumps=JUMPS, trajectory=budget, **control)
    every = NeuralODE(f, jumps=JUMPS, **control)
    found = [gradients(lambda u, node=node: node(u, TIMES), u0, list(f.parameters())) for node in (few, every)]
    assert distance(*found) < 1e-14
    assert few.last_solve.recomputed_steps > 0


@pytest.mark.parametrize("newton", ["petsc", "batch"])
@pytest.mark.parametrize("method", ["cn", "arkimex_3"])
def test_implicit_steps_are_those_of_solves_from_jump_to_jump(method: str, newton: str) -> None:
    f, g, u0 = Switched(), Network(seed=4), random(2, 3)
    split = method.startswith("arkimex")
    func = SplitFunction(implicit=f, explicit=g) if split else f
    options = TIGHT if newton == "petsc" else {}
    node = NeuralODE(func, method=method, step_size=0.1, jumps=JUMPS, newton=newton, options=options)
    table = ARKIMEX["3"] if split else CRANK_NICOLSON
    found = gradients(lambda u: node(u, TIMES), u0, list(f.parameters()))
    plain = gradients(
        lambda u: piecewise(f, u, lambda h, v, t: odeint_implicit(h, v, t, table, 0.1, explicit=g if split else None)),
        u0,
        list(f.parameters()),
    )
    assert distance(found, plain) < 1e-10


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "cn"])
def test_error_control_starts_anew_at_a_jump(method: str) -> None:
    f, u0 = Switched(), random(2, 3)
    rtol = 1e-3 if method == "cn" else 1e-5
    keywords: dict[str, Any] = {"method": method, "rtol": rtol, "atol": rtol / 100}
    if method == "cn":
        keywords["options"] = TIGHT
    node = NeuralODE(f, jumps=JUMPS, **keywords)
    found = gradients(lambda u: node(u, TIMES), u0, list(f.parameters()))
    steps = node.last_solve.forward_steps
    pieces = NeuralODE(lambda t, u: u, **keywords)
    total = 0

    def solve(g: Callable[..., torch.Tensor], u: torch.Tensor, t: list[float]) -> torch.Tensor:
        nonlocal total
        pieces.func = g
        states = pieces(u, t)
        total += pieces.last_solve.forward_steps
        return states

    wanted = gradients(lambda u: piecewise(f, u, solve), u0, list(f.parameters()))
    assert distance(found, wanted) < (1e-12 if method != "cn" else 1e-10)
    assert steps == total


def test_without_jumps_error_control_needs_more_evaluations() -> None:
    f, u0 = Switched(), random(2, 3)
    aware, blind = (NeuralODE(f, rtol=1e-8, atol=1e-10, jumps=jumps) for jumps in (JUMPS, None))
    distance(aware(u0, TIMES), blind(u0, TIMES))
    assert aware.last_solve.rejected_steps < blind.last_solve.rejected_steps
    assert aware.last_solve.function_evaluations < blind.last_solve.function_evaluations


def test_decreasing_times_meet_the_jumps_from_the_other_side() -> None:
    f, u0 = Switched("before"), random(2, 3)
    found = odeint(f, u0, TIMES[::-1], step_size=0.08, jumps=JUMPS)[-1]
    state = u0
    for number, (begin, end) in enumerate(pairwise(INSIDE[::-1])):
        times = [begin, *(time for time in TIMES[::-1] if end < time < begin), end]
        state = odeint_plain(f.piece(4 - number), state, times, TABLEAUX["4"], 0.08)[-1]
    assert distance(found, state) < 1e-12


def classical(f: Switched, u: torch.Tensor, t: torch.Tensor, jumps: list[float], step: float) -> torch.Tensor:
    """The classical method in plain torch, differentiable in the times; jumps are constant ends of steps."""
    fixed = [(jump, torch.tensor(jump, dtype=t.dtype)) for jump in jumps]
    knots = sorted([(float(time.detach()), time) for time in t] + fixed)
    outputs = [u]
    for (first, begin), (last, end) in pairwise(knots):
        passed = 1 + sum(jump <= first for jump in jumps)
        g, count = f.piece(passed), divided((first, last), step).steps
        h = (end - begin) / count
        for number in range(count):
            at = begin + number * h
            a = g(at, u)
            b = g(at + h / 2, u + h / 2 * a)
            c = g(at + h / 2, u + h / 2 * b)
            d = g(at + h, u + h * c)
            u = u + h / 6 * (a + 2 * b + 2 * c + d)
        if last in t.tolist():
            outputs.append(u)
    return torch.stack(outputs)


@pytest.mark.parametrize("keep", ["solution", "graph"])
def test_the_gradient_with_respect_to_times_holds_jumps_constant(keep: str) -> None:
    jumps = [0.45, 0.9]
    f, u0 = Switched(jumps=[-1.0, *jumps]), random(2, 3)
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    node = NeuralODE(f, step_size=0.1, jumps=jumps, trajectory=Trajectory(ram="1MiB", keep=keep))
    (found,) = torch.autograd.grad(node(u0, t).square().sum(), t)
    (wanted,) = torch.autograd.grad(classical(f, u0, t, jumps, 0.1).square().sum(), t)
    assert distance(found, wanted) < 1e-12


def test_a_time_with_a_gradient_that_is_a_jump_is_refused() -> None:
    t = torch.tensor(TIMES, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ConfigurationError, match=r"t\[2\] = 0\.7 is one of jumps"):
        odeint(Switched(), random(2, 3), t, step_size=0.1, jumps=[0.7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_f_in_a_short_type_gets_times_on_its_side_of_a_jump(dtype: torch.dtype) -> None:
    seen: list[tuple[float, float]] = []

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.append((float(t), float(torch.tensor(0.7, dtype=dtype))))
        return torch.where(t < 0.7, torch.ones_like(u), torch.full_like(u, -1.0))

    found = odeint(f, torch.zeros(1, dtype=torch.float64), [0.0, 1.4], jumps=[0.7], compute_dtype=dtype)
    assert abs(float(found[-1])) < 1e-12
    assert all(time != jump for time, jump in seen)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("control", [{"step_size": 0.01}, {"rtol": 1e-6, "atol": 1e-8}], ids=["fixed", "control"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_compiled_steps_stay_on_their_side_of_a_jump(control: dict[str, float]) -> None:
    f, u0 = Switched(), random(2, 3)
    compiled = NeuralODE(f, jumps=JUMPS, compile="aot_eager", **control)
    eager = NeuralODE(f, jumps=JUMPS, **control)
    found = [gradients(lambda u, node=node: node(u, TIMES), u0, list(f.parameters())) for node in (compiled, eager)]
    assert distance(*found) < 1e-12


@pytest.mark.parametrize(
    ("jumps", "message"),
    [
        (0.5, "must be a sequence of times"),
        ([0.5, float("nan")], "must be finite"),
        (torch.zeros(2, 2), "must be one-dimensional"),
        (torch.zeros(2, requires_grad=True), "cannot require a gradient"),
        (["a"], "must be a sequence of times"),
    ],
)
def test_other_jumps_are_refused(jumps: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"jumps.*{message}"):
        odeint(Network(), random(2, 3), TIMES, jumps=jumps)


def test_jumps_divide_intervals_and_leave_the_outputs_where_they_are() -> None:
    grid = divided((0.0, 1.0, 2.0), 0.5, jumps=(0.25, 1.0))
    assert grid.starts == (0.0, 0.25, 0.625, 1.0, 1.5)
    assert grid.outputs == {0: 0, 3: 1, 5: 2}
    assert grid.jumps == {1: 0.25, 3: 1.0}


@pytest.mark.parametrize("control", [{"step_size": 0.1}, {"rtol": 1e-6, "atol": 1e-8}], ids=["fixed", "control"])
def test_derivatives_of_all_orders_know_the_jumps(control: dict[str, float]) -> None:
    f, u0, along = Switched(), random(2, 3), random(2, 3, seed=5)
    node = NeuralODE(f, jumps=JUMPS, **control)
    node(u0, TIMES)
    _, tangents = node.jvp(u0, TIMES, along)
    start = u0.clone().requires_grad_()
    states = node(start, TIMES)
    weights = random(*states.shape, seed=6)
    (first,) = torch.autograd.grad((states.sin() * weights).sum(), start, create_graph=True)
    # The tangent of the loss along a direction, from both ends.
    pushed = (states.detach().cos() * weights * tangents.detach()).sum()
    assert float((first.detach() * along).sum()) == pytest.approx(float(pushed), rel=1e-12)
    (second,) = torch.autograd.grad((first * along).sum(), start)
    if "step_size" in control:
        plain = u0.clone().requires_grad_()
        wanted = piecewise(f, plain, lambda g, v, t: odeint_plain(g, v, t, TABLEAUX["4"], 0.1))
        (own,) = torch.autograd.grad((wanted.sin() * weights).sum(), plain, create_graph=True)
        (expected,) = torch.autograd.grad((own * along).sum(), plain)
        assert distance(second, expected) < 1e-11


@pytest.mark.slow
@pytest.mark.nightly
def test_compiled_newton_steps_stay_on_their_side_of_a_jump() -> None:
    f, u0 = Switched(), random(2, 3)
    settings: dict[str, Any] = {"method": "cn", "newton": "batch", "step_size": 0.1, "jumps": JUMPS}
    compiled, eager = NeuralODE(f, compile="aot_eager", **settings), NeuralODE(f, **settings)
    found = [gradients(lambda u, node=node: node(u, TIMES), u0, list(f.parameters())) for node in (compiled, eager)]
    assert distance(*found) < 1e-10  # Newton's tolerance
