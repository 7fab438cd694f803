"""`between_steps`: a map of the state after each step, with its gradient for every family, level and budget."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import vmap

from pnode_dist import NeuralODE, SplitFunction, Trajectory, odeint, solve_dense
from pnode_dist.errors import ConfigurationError, RecomputationError
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.between_steps import Step, in_equal_steps, mapped_solve
from tests.oracles.dirk_tableaux import DIRK
from tests.oracles.events import step as explicit_step
from tests.oracles.implicit import BACKWARD_EULER, CRANK_NICOLSON, odeint_implicit
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX
from tests.oracles.symplectic import verlet
from tests.tiers import at_night

D = torch.float64
TIMES, STEP_SIZE = [0.0, 0.4, 0.5, 1.0], 0.1
U0 = random(4, 3)
EXACT = {"snes_rtol": 1e-13, "ksp_rtol": 1e-13}
FUNC = Network()


class Filter(nn.Module):
    """A map with a parameter that depends on time, not linear in u."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(random(3, 3, seed=5) * 0.1)

    def forward(self, t: torch.Tensor, u: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        return u - torch.sin(t) * torch.tanh(u @ self.mix)


FILTER = Filter()
LEVELS = at_night(["graph", "stages", "solution"], but=["graph", "solution"])
PARAMETERS = [*FUNC.parameters(), *FILTER.parameters()]
Solved = tuple[torch.Tensor, ...]


def explicit(t: torch.Tensor, u: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return explicit_step(FUNC, TABLEAUX["4"], t, u, size)


def implicit(method: Any, split: nn.Module | None = None) -> Step:
    def step(t: torch.Tensor, u: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(FUNC, u, torch.stack([t, t + size]), method, explicit=split)[-1]

    return step


def loss_of(states: torch.Tensor, inputs: list[torch.Tensor]) -> Solved:
    return states.detach(), *torch.autograd.grad(states.sin().sum(), inputs)


def wanted(step: Step, parameters: list[nn.Parameter] = PARAMETERS, step_size: float = STEP_SIZE) -> Solved:
    """The states, and the gradients with respect to initial state, times and parameters."""
    u0, t = U0.clone().requires_grad_(), torch.tensor(TIMES, dtype=D, requires_grad=True)
    states = mapped_solve(step, FILTER, u0, in_equal_steps(t, step_size))
    return loss_of(torch.stack(states), [u0, t, *parameters])


def found(func: Any = FUNC, parameters: list[nn.Parameter] = PARAMETERS, **settings: Any) -> Solved:
    u0, t = U0.clone().requires_grad_(), torch.tensor(TIMES, dtype=D, requires_grad=True)
    settings = {"step_size": STEP_SIZE, "between_steps": FILTER, **settings}
    return loss_of(odeint(func, u0, t, **settings), [u0, t, *parameters])


BUDGETS: dict[str, Trajectory] = {
    "all graphs": Trajectory(),
    "stages": Trajectory(keep="stages"),
    "states": Trajectory(keep="solution"),
    "one checkpoint": Trajectory(keep="solution", ram_slots=1),
    "stages and two checkpoints": Trajectory(keep="stages", ram_slots=2),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_an_explicit_solve_has_the_gradient_of_plain_torch(budget: Trajectory) -> None:
    assert distance(found(method="rk4", trajectory=budget), wanted(explicit)) <= 1e-12


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_joined_graphs_have_the_gradient_of_plain_torch(budget: Trajectory) -> None:
    # Without a gradient with respect to times the graphs of several steps are one.
    u0 = U0.clone().requires_grad_()
    states = mapped_solve(explicit, FILTER, u0, in_equal_steps(torch.tensor(TIMES, dtype=D), STEP_SIZE))
    by_hand = loss_of(torch.stack(states), [u0, *PARAMETERS])
    solved = gradients(
        lambda u: odeint(FUNC, u, TIMES, step_size=STEP_SIZE, between_steps=FILTER, trajectory=budget), U0, PARAMETERS
    )
    assert distance(solved, by_hand) <= 1e-12


def test_checkpoints_on_disk_have_the_gradient_of_plain_torch() -> None:
    budget = Trajectory(ram_slots=2, disk="1MiB", keep="solution", schedule="multistage")
    assert distance(found(method="rk4", trajectory=budget), wanted(explicit)) <= 1e-12


LINEAR = Network(seed=3)
SPLIT = SplitFunction(implicit=FUNC, explicit=LINEAR)
IMPLICIT: dict[str, tuple[Step, dict[str, Any]]] = {
    "beuler": (implicit(BACKWARD_EULER), {"newton": "petsc", "options": EXACT}),
    "cn": (implicit(CRANK_NICOLSON), {"newton": "petsc", "options": EXACT}),
    "cn by batches": (implicit(CRANK_NICOLSON), {"newton": "batch", "options": {"snes_rtol": 1e-13}}),
    "dirk_s212": (implicit(DIRK["s212"]), {"newton": "petsc", "options": EXACT}),
    "arkimex_3": (implicit(ARKIMEX["3"], LINEAR), {"func": SPLIT, "newton": "petsc", "options": EXACT}),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_solve_has_the_gradient_of_plain_torch(name: str, level: str) -> None:
    step, settings = IMPLICIT[name]
    parameters = [*PARAMETERS, *(LINEAR.parameters() if "func" in settings else ())]
    by_hand = wanted(step, parameters, 0.25)
    budget = Trajectory(keep=level, **({"ram_slots": 1} if level == "solution" else {}))
    method = name.split()[0]
    solved = found(parameters=parameters, method=method, step_size=0.25, trajectory=budget, **settings)
    assert distance(solved, by_hand) <= 1e-11


@pytest.mark.parametrize("level", LEVELS)
def test_a_symplectic_solve_of_a_pair_has_the_gradient_of_plain_torch(level: str) -> None:
    strength = torch.tensor(0.7, dtype=D, requires_grad=True)

    def force(t: Any, q: torch.Tensor) -> torch.Tensor:
        return -torch.sin(q) * strength

    def func(t: Any, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return u[1], force(t, u[0])

    def onto_the_circle(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        norm = (u[0] * u[0] + strength * u[1] * u[1]).sum().sqrt()
        return u[0] / norm, u[1] * (1 + 0.1 * t)

    def both(solve: Any) -> Solved:
        q, p = random(3).requires_grad_(), random(3, seed=2).requires_grad_()
        states = solve((q, p))
        loss = sum(part.square().sum() for part in states)
        return (*(part.detach() for part in states), *torch.autograd.grad(loss, [q, p, strength]))

    def by_hand(u0: Any) -> Any:
        intervals = in_equal_steps(torch.tensor(TIMES, dtype=D), STEP_SIZE)
        states = mapped_solve(
            lambda t, u, size: verlet(lambda _, p: p, force, t, size, u), onto_the_circle, u0, intervals
        )
        return tuple(torch.stack(parts) for parts in zip(*states, strict=True))

    def solved(u0: Any) -> Any:
        settings: Any = {"method": "leapfrog", "between_steps": onto_the_circle, "trajectory": Trajectory(keep=level)}
        return odeint(func, u0, TIMES, step_size=STEP_SIZE, **settings)

    assert distance(both(solved), both(by_hand)) <= 1e-12


def test_forward_only_methods_are_mapped_too() -> None:
    for method, first in (("ssp_rks2", TABLEAUX), ("rosw_ra34pw2", None)):
        with torch.no_grad():
            whole = odeint(FUNC, U0, [0.0, 0.2], method=method, step_size=0.1, between_steps=FILTER)
            state, t = U0, torch.tensor([0.0, 0.1, 0.2], dtype=D)
            for begin, end in pairwise(t):
                state = FILTER(end, odeint(FUNC, state, [begin, end], method=method)[-1])
        assert distance(whole[-1], state) <= (1e-12 if first else 1e-8)


ADAPTIVE: dict[str, tuple[Step, dict[str, Any]]] = {
    "dopri5": (lambda t, u, size: explicit_step(FUNC, TABLEAUX["5dp"], t, u, size), {}),
    "pid": (lambda t, u, size: explicit_step(FUNC, TABLEAUX["5dp"], t, u, size), {"adaptor": "pid"}),
    "bosh3": (lambda t, u, size: explicit_step(FUNC, TABLEAUX["3bs"], t, u, size), {}),
    "arkimex_3": (implicit(ARKIMEX["3"]), {"newton": "petsc", "options": EXACT}),
    "cn": (implicit(CRANK_NICOLSON), {"newton": "petsc", "options": EXACT, "rtol": 1e-3}),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_accepted_steps_are_mapped_with_the_gradient_of_plain_torch(name: str, level: str) -> None:
    step, settings = ADAPTIVE[name]
    method = "dopri5" if name == "pid" else name
    budget = Trajectory(keep=level, **({} if level == "graph" else {"ram_slots": 2}))
    settings = {"rtol": 1e-5, "save": ("times", "steps"), "method": method, "trajectory": budget, **settings}
    u0 = U0.clone().requires_grad_()
    saved = odeint(FUNC, u0, TIMES, between_steps=FILTER, **settings)
    assert len(saved.t) > len(TIMES)
    by_hand = U0.clone().requires_grad_()
    states = mapped_solve(step, FILTER, by_hand, list(pairwise(saved.t.detach())))
    solved = loss_of(saved.u, [u0, *PARAMETERS])
    assert distance(solved, loss_of(torch.stack(states), [by_hand, *PARAMETERS])) <= 1e-11


@pytest.mark.parametrize("method", ["dopri5", "cn", "arkimex_3"])
def test_error_control_looks_at_the_step_without_the_map(method: str) -> None:
    def jump(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u + 1.0

    settings: dict[str, Any] = {"method": method, "rtol": 1e-8, "atol": 1e-10, "save": "steps"}
    saved = odeint(lambda t, u: 0 * u, U0, [0.0, 1.0], between_steps=jump, **settings)
    steps = len(saved.t) - 1
    assert steps <= 12
    assert distance(saved.u[-1], U0 + steps) <= 1e-14


COMPILED: dict[str, dict[str, Any]] = {
    "given steps": {"step_size": 0.05},
    "one checkpoint": {"step_size": 0.05, "trajectory": Trajectory(keep="solution", ram_slots=1)},
    "stages": {"step_size": 0.05, "trajectory": Trajectory(keep="stages")},
    "error control": {"rtol": 1e-5},
    "jumps": {"step_size": 0.05, "jumps": [0.3]},
    "a running cost": {"step_size": 0.05, "integrate": lambda t, u: u.square().sum()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", at_night(COMPILED, but=["given steps", "error control"]))
def test_compiled_steps_are_mapped_alike(name: str) -> None:
    def states(found: Any) -> torch.Tensor:
        return found if isinstance(found, torch.Tensor) else found.u + found.integral[:, None, None]

    settings = {"between_steps": FILTER, **COMPILED[name]}
    plain, compiled = NeuralODE(FUNC, **settings), NeuralODE(FUNC, **settings, compile="eager")
    by_hand, solved = (
        gradients(lambda u, node=node: states(node(u, TIMES)), U0, PARAMETERS) for node in (plain, compiled)
    )
    assert distance(solved, by_hand) <= 1e-12


@pytest.mark.nightly
def test_another_map_compiles_the_steps_anew() -> None:
    node = NeuralODE(FUNC, step_size=0.1, compile="eager", between_steps=lambda t, u: 0.5 * u)
    first = node(U0, TIMES)
    node.between_steps = lambda t, u: 0.25 * u
    assert (
        distance(node(U0, TIMES)[1], odeint(FUNC, U0, TIMES, step_size=0.1, between_steps=node.between_steps)[1])
        <= 1e-13
    )
    assert distance(first[1], node(U0, TIMES)[1]) > 0.1


def test_outputs_observations_and_the_last_state_are_those_after_the_map() -> None:
    settings: dict[str, Any] = {"step_size": STEP_SIZE, "between_steps": FILTER}
    states = odeint(FUNC, U0, TIMES, **settings)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        odeint(FUNC, U0, TIMES, on_output=lambda t, u: seen.append(u.clone()), **settings)
    assert torch.equal(torch.stack(seen), states)
    for keep in ("graph", "stages", "solution"):
        budget = Trajectory(keep=keep)
        whole = gradients(lambda u: odeint(FUNC, u, TIMES, **settings)[1:].square().sum((1, 2)), U0, PARAMETERS)
        observed = gradients(
            lambda u, budget=budget: odeint(
                FUNC, u, TIMES, observe=lambda t, u: u.square().sum(), trajectory=budget, **settings
            )[1:],
            U0,
            PARAMETERS,
        )
        assert distance(observed, whole) <= 1e-12
        last = gradients(
            lambda u, budget=budget: odeint(FUNC, u, TIMES, last_only=True, trajectory=budget, **settings),
            U0,
            PARAMETERS,
        )
        assert distance(last, gradients(lambda u: odeint(FUNC, u, TIMES, **settings)[-1], U0, PARAMETERS)) <= 1e-12


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["rk4", "cn", "beuler"])
def test_a_running_cost_is_that_of_the_steps_before_the_map(method: str, level: str) -> None:
    def cost(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u.square().sum() * (1 + t)

    def whole(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        u = s[:-1].reshape(4, 3)
        return torch.cat([FUNC(t, u).reshape(-1), cost(t, u)[None]])

    def after(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.cat([FILTER(t, s[:-1].reshape(4, 3)).reshape(-1), s[-1:]])

    def step(t: torch.Tensor, s: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        if method == "rk4":
            return explicit_step(whole, TABLEAUX["4"], t, s, size)
        table = CRANK_NICOLSON if method == "cn" else BACKWARD_EULER
        return odeint_implicit(whole, s, torch.stack([t, t + size]), table)[-1]

    u0, t = U0.clone().requires_grad_(), torch.tensor(TIMES, dtype=D, requires_grad=True)
    start = torch.cat([u0.reshape(-1), torch.zeros(1, dtype=D)])
    by_hand = torch.stack(mapped_solve(step, after, start, in_equal_steps(t, 0.25)))
    options: dict[str, Any] = {} if method == "rk4" else {"options": EXACT, "newton": "petsc"}
    budget = Trajectory(keep=level)
    settings: dict[str, Any] = {"method": method, "step_size": 0.25, "integrate": cost, "trajectory": budget, **options}
    solved = odeint(FUNC, u0, t, between_steps=FILTER, **settings)
    assert distance(solved.u.reshape(4, -1), by_hand[:, :-1]) <= 1e-12
    assert distance(solved.integral, by_hand[:, -1]) <= 1e-12
    inputs = [u0, t, *PARAMETERS]
    loss = solved.u.sin().sum() + solved.integral.cos().sum()
    gradient = torch.autograd.grad(loss, inputs)
    plain = torch.autograd.grad(by_hand[:, :-1].sin().sum() + by_hand[:, -1].cos().sum(), inputs)
    assert distance(gradient, plain) <= 1e-11


def test_second_derivatives_are_those_of_plain_torch() -> None:
    def product(solve: Any) -> Solved:
        u0 = U0.clone().requires_grad_()
        (first,) = torch.autograd.grad(solve(u0)[-1].sin().sum(), u0, create_graph=True)
        return torch.autograd.grad((first * random(4, 3, seed=7)).sum(), [u0, *PARAMETERS])

    intervals = in_equal_steps(torch.tensor(TIMES, dtype=D), STEP_SIZE)
    by_hand = product(lambda u: torch.stack(mapped_solve(explicit, FILTER, u, intervals)))
    for keep in ("graph", "solution"):
        budget = Trajectory(keep=keep)
        solved = product(
            lambda u, budget=budget: odeint(
                FUNC, u, TIMES, step_size=STEP_SIZE, between_steps=FILTER, trajectory=budget
            )
        )
        assert distance(solved, by_hand) <= 1e-11


def test_tangents_of_a_module_are_those_of_plain_torch() -> None:
    node = NeuralODE(FUNC, step_size=STEP_SIZE, between_steps=FILTER)
    along = {FILTER.mix: random(3, 3, seed=8)}
    _, tangents = node.jvp(U0, TIMES, random(4, 3, seed=9), along)
    intervals = in_equal_steps(torch.tensor(TIMES, dtype=D), STEP_SIZE)

    def solve(u: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        def between(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(FILTER, {"mix": mix}, (t, u))

        return torch.stack(mapped_solve(explicit, between, u, intervals))

    _, by_hand = torch.func.jvp(solve, (U0, FILTER.mix.detach()), (random(4, 3, seed=9), along[FILTER.mix]))
    assert distance(tangents, by_hand) <= 1e-12


def test_a_batch_under_vmap_is_that_of_single_states() -> None:
    batch = random(2, 4, 3)

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(FUNC, u, TIMES, step_size=STEP_SIZE, between_steps=FILTER)

    assert distance(vmap(solve)(batch), torch.stack([solve(u) for u in batch])) <= 1e-13


def test_a_complex_state_is_mapped_in_complex_numbers() -> None:
    u0 = torch.complex(U0, random(4, 3, seed=4)).requires_grad_()
    turn = torch.tensor(0.3, dtype=D, requires_grad=True)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 1j * u * u.abs()

    def between(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        assert u.is_complex()
        return u * torch.exp(1j * turn * t)

    step: Step = lambda t, u, size: explicit_step(func, TABLEAUX["4"], t, u, size)  # noqa: E731
    states = torch.stack(mapped_solve(step, between, u0, in_equal_steps(torch.tensor(TIMES, dtype=D), STEP_SIZE)))
    by_hand = torch.autograd.grad(states.real.sin().sum() + states.imag.cos().sum(), [u0, turn])
    solved = odeint(func, u0, TIMES, step_size=STEP_SIZE, between_steps=between)
    assert distance(solved, states) <= 1e-13
    gradient = torch.autograd.grad(solved.real.sin().sum() + solved.imag.cos().sum(), [u0, turn])
    assert distance(gradient, by_hand) <= 1e-12


def test_the_map_gets_the_extra_arguments_and_the_ends_of_the_steps() -> None:
    seen: list[float] = []

    def between(t: torch.Tensor, u: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen.append(float(t))
        return scale * u

    scale = torch.tensor(2.0, dtype=D, requires_grad=True)
    times = [0.1, 0.3, 0.7]
    last = odeint(lambda t, u, s: 0 * u, U0, times, step_size=0.2, args=(scale,), between_steps=between, save="last")
    assert [time for time in seen if time in times[1:]] == [0.3, 0.7]
    assert len(seen) == 3
    (gradient,) = torch.autograd.grad(last.sum(), scale)
    assert distance(gradient, 3 * 4.0 * U0.sum()) <= 1e-14


def test_at_a_jump_and_in_decreasing_time_the_map_gets_the_end_of_the_step_itself() -> None:
    seen: list[float] = []

    def between(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.append(float(t))
        return FILTER(t, u)

    jumped = odeint(FUNC, U0, [1.0, 0.0], step_size=0.25, jumps=[0.5], between_steps=between)
    states = mapped_solve(explicit, FILTER, U0, in_equal_steps(torch.tensor([1.0, 0.0], dtype=D), 0.25))
    assert distance(jumped, torch.stack(states)) <= 1e-13
    assert list(dict.fromkeys(seen))[:4] == [0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_it_computes_in_the_type_of_u0_whatever_f_and_the_steps_have(method: str) -> None:
    seen: set[torch.dtype] = set()

    def between(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.update({t.dtype, u.dtype})
        return u * 0.5

    u0 = U0.float().requires_grad_()
    settings: dict[str, Any] = {"method": method, "compute_dtype": torch.float64, "between_steps": between}
    last = odeint(lambda t, u: 0 * u, u0, [0.0, 1.0], step_size=0.25, save="last", **settings)
    (gradient,) = torch.autograd.grad(last.sum(), u0)
    assert seen == {torch.float32}
    assert torch.equal(last.detach(), u0.detach() / 16)
    assert torch.equal(gradient, torch.full_like(u0, 1 / 16))


def test_inference_mode_has_the_same_states() -> None:
    wanted = odeint(FUNC, U0, TIMES, step_size=STEP_SIZE, between_steps=FILTER).detach()
    with torch.inference_mode():
        assert torch.equal(odeint(FUNC, U0, TIMES, step_size=STEP_SIZE, between_steps=FILTER), wanted)


def test_transforms_differentiate_with_respect_to_what_the_map_closes_over() -> None:
    def last(strength: torch.Tensor) -> torch.Tensor:
        def between(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return u - strength * torch.tanh(u)

        return odeint(FUNC, U0, [0.0, 0.3], step_size=0.1, between_steps=between, save="last").sin().sum()

    strength = torch.tensor(0.2, dtype=D, requires_grad=True)
    (wanted,) = torch.autograd.grad(last(strength), strength)
    assert distance(torch.func.grad(last)(strength.detach()), wanted) <= 1e-13


def test_random_numbers_of_the_map_are_drawn_again_in_recomputed_steps() -> None:
    def noise(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u * (1 + 0.1 * torch.randn(u.shape, dtype=u.dtype))

    def solved(keep: str) -> Solved:
        torch.manual_seed(3)
        budget = Trajectory(keep=keep, **({"ram_slots": 1} if keep == "solution" else {}))
        return gradients(
            lambda u: odeint(FUNC, u, TIMES, step_size=STEP_SIZE, between_steps=noise, trajectory=budget),
            U0,
            list(FUNC.parameters()),
        )

    assert distance(solved("solution"), solved("graph")) <= 1e-14
    assert distance(solved("stages"), solved("graph")) <= 1e-14


def test_a_map_with_another_value_in_the_backward_pass_is_an_error() -> None:
    def noise(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u * (1 + 0.1 * torch.rand_like(u))

    for budget in (Trajectory(keep="solution"), Trajectory(keep="stages")):
        u0 = U0.clone().requires_grad_()
        settings: dict[str, Any] = {"between_steps": noise, "trajectory": budget, "preserve_rng_state": False}
        last = odeint(FUNC, u0, TIMES, step_size=STEP_SIZE, **settings)
        with pytest.raises(RecomputationError, match="recomputed for the gradient, differs"):
            last.sum().backward()


def test_its_tape_is_charged_to_the_budget() -> None:
    wide = nn.Linear(3, 4000, bias=False).double()

    def between(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u + 1e-4 * torch.tanh(wide(u)).mean(-1, keepdim=True)

    def kept(**settings: Any) -> int:
        node = NeuralODE(FUNC, step_size=STEP_SIZE, trajectory=Trajectory(keep="graph"), **settings)
        node(U0.clone().requires_grad_(), TIMES)
        return node.last_solve.graph_bytes

    assert kept(between_steps=between) - kept() >= 10 * 4 * 4000 * 8


def test_a_map_that_is_a_module_is_a_submodule() -> None:
    node = NeuralODE(FUNC, step_size=STEP_SIZE, between_steps=FILTER)
    assert {id(parameter) for parameter in node.parameters()} == {id(parameter) for parameter in PARAMETERS}
    assert "between_steps.mix" in node.state_dict()
    other = copy.deepcopy(node)
    assert other.between_steps is dict(other.named_children())["between_steps"]
    assert other.between_steps is not FILTER
    assert distance(other(U0, TIMES), node(U0, TIMES)) == 0.0
    for between in (lambda t, u: u, None):
        node.between_steps = between
        assert node.between_steps is between
        assert len(list(node.parameters())) == len(list(FUNC.parameters()))


def test_a_func_that_differentiates_later_on_is_refused_where_graphs_were_joined() -> None:
    weight = torch.tensor(0.5, dtype=D, requires_grad=True)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if t < 0.55:
            return -weight * u
        (slope,) = torch.autograd.grad((weight * weight * u.square()).sum(), weight, create_graph=True)
        return -slope * u

    def gradient(keep: str) -> torch.Tensor:
        settings: dict[str, Any] = {"between_steps": lambda t, u: 0.9 * u, "trajectory": Trajectory(keep=keep)}
        last = odeint(func, U0, [0.0, 1.0], step_size=0.1, save="last", **settings)
        (found,) = torch.autograd.grad(last.sum(), weight)
        return found

    with pytest.raises(ConfigurationError, match=r"between_steps: at t = .* no common graph: use keep"):
        gradient("auto")
    assert bool(gradient("stages").isfinite())


def _in_place(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return u.mul_(0.5)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no function": ({"between_steps": 3}, TypeError, "between_steps must be callable"),
    "shape": ({"between_steps": lambda t, u: u[0]}, ValueError, r"between_steps returned shape \(3,\)"),
    "number": ({"between_steps": lambda t, u: 1.0}, TypeError, "between_steps must return a tensor like u, got float"),
    "type": ({"between_steps": lambda t, u: u.int()}, TypeError, "between_steps returned torch.int32"),
    "in place": ({"between_steps": _in_place}, ConfigurationError, "between_steps: it writes to the state"),
    "bdf": ({"between_steps": FILTER, "method": "bdf"}, ConfigurationError, "between_steps: method = 'bdf' takes"),
}


@pytest.mark.parametrize(("settings", "kind", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("gradient", [False, True])
def test_mistakes_are_one_line(settings: dict[str, Any], kind: type[Exception], message: str, gradient: bool) -> None:
    with pytest.raises(kind, match=message):
        odeint(FUNC, U0.clone().requires_grad_(gradient), [0.0, 0.2], step_size=0.1, **settings)


def test_a_dense_solution_refuses_it() -> None:
    with pytest.raises(ConfigurationError, match="between_steps: a dense solution has a solution within each step"):
        solve_dense(FUNC, U0, [0.0, 1.0], step_size=0.1, between_steps=FILTER)
