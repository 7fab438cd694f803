"""Symplectic methods: their order, values and gradients against plain torch, and the energy over a long time."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, Separable, Trajectory, odeint
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.steppers.symplectic_step import COMPOSITIONS, Composition
from tests.oracles.implicit_tableaux import Tree, coloured_trees
from tests.oracles.right_hand_sides import distance, identical, random
from tests.oracles.symplectic import STEPS, odeint_symplectic

D = torch.float64
TIMES, STEP_SIZE = [0.0, 0.4, 0.7, 1.5], 0.25
SYMPLECTIC = [name for name, method in METHODS.items() if method.family == "symplectic"]


class Force(nn.Module):
    """dp/dt = tanh(q w + b) w^T, with a drive: the gradient of a network's potential."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(random(3, 4, seed=1)), nn.Parameter(random(4, seed=2))
        self.calls = 0

    def forward(self, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return -torch.tanh(q @ self.weight + self.bias) @ self.weight.T + 0.3 * torch.cos(2 * t)


class Velocity(nn.Module):
    """dq/dt of a relativistic kinetic energy with masses, and a wind."""

    def __init__(self) -> None:
        super().__init__()
        self.masses = nn.Parameter(torch.tensor([1.0, 2.0, 0.5], dtype=D))
        self.calls = 0

    def forward(self, t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return p / (self.masses**2 + p**2).sqrt() + 0.2 * torch.sin(3 * t)


class Whole(nn.Module):
    """The same system as one function."""

    def __init__(self, velocity: nn.Module, force: nn.Module) -> None:
        super().__init__()
        self.velocity, self.force = velocity, force

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        q, p = u
        return self.velocity(t, p), self.force(t, q)


@pytest.fixture
def parts() -> tuple[Velocity, Force]:
    return Velocity(), Force()


def start() -> tuple[torch.Tensor, torch.Tensor]:
    return random(2, 3).requires_grad_(), random(2, 3, seed=3).requires_grad_()


def derivatives(solution: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = torch.sin(torch.stack(solution)).sum()
    return [torch.stack(solution).detach(), *torch.autograd.grad(loss, inputs)]


def test_every_symplectic_method_has_an_oracle_and_a_composition() -> None:
    assert list(STEPS) == list(COMPOSITIONS) == SYMPLECTIC
    for name, composition in COMPOSITIONS.items():
        assert METHODS[name].evaluations_per_step == len(composition.moves)


def order_defect(composition: Composition, order: int) -> float:
    """The largest violation of the conditions for partitioned Runge-Kutta methods of separable systems.

    Adjacent vertices of their trees have different colours. Hairer, Lubich & Wanner 2006, section III.2.
    """
    kicks, drifts = np.array(composition.kicks), np.array(composition.drifts)
    # Positions at kick i are moved by the drifts before it, momenta at drift j by the kicks before it.
    of_kick = np.array([[drift * (j < i) for j, drift in enumerate(drifts)] for i in range(len(kicks))])
    of_drift = np.array([[kick * (i <= j) for i, kick in enumerate(kicks)] for j in range(len(drifts))])
    matrices = {0: of_kick, 1: of_drift}

    def alternates(tree: Tree) -> bool:
        return all(branch[0] != tree[0] and alternates(branch) for branch in tree[1])

    def vertices(tree: Tree) -> int:
        return 1 + sum(map(vertices, tree[1]))

    def density(tree: Tree) -> int:
        return vertices(tree) * math.prod(map(density, tree[1]))

    @cache
    def weights_of(tree: Tree) -> Any:
        colour, branches = tree
        factors = np.ones(len(matrices[colour]))
        for branch in branches:
            factors = factors * (matrices[colour] @ weights_of(branch))
        return factors

    trees = [tree for size in range(1, order + 1) for tree in coloured_trees(size, 2) if alternates(tree)]
    final = (kicks, drifts)
    return max(abs(float(final[tree[0]] @ weights_of(tree)) - 1 / density(tree)) for tree in trees)


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_a_composition_satisfies_every_order_condition_up_to_its_order_alone(name: str) -> None:
    order = METHODS[name].order
    assert order_defect(COMPOSITIONS[name], order) <= 1e-14
    assert order_defect(COMPOSITIONS[name], order + 1) > 1e-4


@pytest.mark.parametrize("separable", [False, True], ids=["one function", "two parts"])
@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("name", SYMPLECTIC)
def test_values_and_gradients_are_those_of_plain_torch(
    name: str, times: list[float], separable: bool, parts: tuple[Velocity, Force]
) -> None:
    velocity, force = parts
    func = Separable(position=velocity, momentum=force) if separable else Whole(velocity, force)
    u0, parameters = start(), list(func.parameters())
    found = derivatives(odeint(func, u0, times, method=name, step_size=STEP_SIZE), [*u0, *parameters])
    plain = odeint_symplectic(velocity, force, u0, times, STEPS[name], STEP_SIZE)
    wanted = derivatives(plain, [*u0, *parameters])
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_gradients_with_respect_to_times_are_those_of_plain_torch(name: str, parts: tuple[Velocity, Force]) -> None:
    velocity, force = parts
    u0, times = start(), torch.tensor([0.1, 0.4, 0.9], dtype=D, requires_grad=True)
    func = Separable(position=velocity, momentum=force)
    wanted = derivatives(odeint_symplectic(velocity, force, u0, times, STEPS[name]), [times, *u0])
    for trajectory in (None, Trajectory(keep="solution"), Trajectory(keep="stages")):
        for right in (func, Whole(velocity, force)):
            found = derivatives(odeint(right, u0, times, method=name, trajectory=trajectory), [times, *u0])
            assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_the_error_of_a_smaller_step_falls_with_the_order(name: str, parts: tuple[Velocity, Force]) -> None:
    func, u0 = Separable(position=parts[0], momentum=parts[1]), start()
    with torch.no_grad():
        exact = torch.stack(odeint(func, u0, [0.0, 2.0], method="verner8", step_size=0.02))[:, -1]
        errors = [
            distance(torch.stack(odeint(func, u0, [0.0, 2.0], method=name, step_size=size))[:, -1], exact)
            for size in (0.1, 0.05)
        ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(METHODS[name].order, abs=0.3)
    assert errors[1] > 1e-13


@pytest.mark.parametrize("separable", [False, True], ids=["one function", "two parts"])
@pytest.mark.parametrize("name", ["leapfrog", "yoshida4"])
def test_the_gradient_has_the_same_bits_under_every_budget(
    name: str, separable: bool, parts: tuple[Velocity, Force], tmp_path: Path
) -> None:
    func = Separable(position=parts[0], momentum=parts[1]) if separable else Whole(*parts)
    node = NeuralODE(func, method=name, step_size=0.1, trajectory=Trajectory(keep="graph"))
    u0, parameters = start(), list(func.parameters())
    ample = derivatives(node(u0, TIMES), [*u0, *parameters])
    assert node.last_solve.recomputed_steps == 0
    for trajectory in (
        Trajectory(keep="solution"),
        Trajectory(ram_slots=1),
        Trajectory(ram_slots=3),
        Trajectory(ram_slots=2, disk_slots=2, directory=tmp_path),
        Trajectory(ram_slots=0, disk_slots=3, directory=tmp_path),
    ):
        node.trajectory = trajectory
        assert identical(derivatives(node(u0, TIMES), [*u0, *parameters]), ample), trajectory
        assert node.last_solve.recomputed_steps > 3
    node.trajectory = Trajectory(keep="stages")
    assert distance(derivatives(node(u0, TIMES), [*u0, *parameters]), ample) <= 1e-14


def test_each_move_evaluates_only_the_part_that_it_needs(parts: tuple[Velocity, Force]) -> None:
    velocity, force = parts
    node = NeuralODE(Separable(position=velocity, momentum=force), method="yoshida4", step_size=0.1)
    with torch.no_grad():
        node(start(), [0.0, 1.0])
    steps = node.last_solve.forward_steps
    assert (velocity.calls, force.calls) == (3 * steps, 4 * steps)
    assert node.last_solve.function_evaluations == 7 * steps
    velocity.calls = force.calls = 0
    node = NeuralODE(Whole(velocity, force), method="leapfrog", step_size=0.1)
    with torch.no_grad():
        node(start(), [0.0, 1.0])
    assert velocity.calls == force.calls == 3 * steps


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_the_energy_stays_bounded_where_that_of_runge_kutta_drifts(name: str) -> None:
    def energy(states: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q, p = states
        return (p**2 / 2 - torch.cos(q)).squeeze(-1)

    pendulum = Separable(position=lambda t, p: p, momentum=lambda t, q: -torch.sin(q))
    u0 = (torch.tensor([1.5], dtype=D), torch.tensor([0.0], dtype=D))
    times = torch.arange(0, 801, dtype=D) * 0.5
    errors = {}
    with torch.no_grad():
        for method in (name, "rk4"):
            found = energy(odeint(pendulum, u0, times, method=method))
            errors[method] = (found - found[0]).abs()
    early, late = errors[name][:200].max(), errors[name][-200:].max()
    assert 0.5 * early < late < 1.2 * early
    assert errors["rk4"][-200:].max() > 3 * errors["rk4"][:200].max()


@pytest.mark.parametrize("name", SYMPLECTIC)
def test_steps_back_in_time_return_to_the_start(name: str, parts: tuple[Velocity, Force]) -> None:
    func, u0 = Separable(position=parts[0], momentum=parts[1]), start()
    with torch.no_grad():
        there = odeint(func, u0, [0.0, 2.0], method=name, step_size=0.2, last_only=True)
        back = odeint(func, there, [2.0, 0.0], method=name, step_size=0.2, last_only=True)
    assert distance(torch.stack(back), torch.stack(u0).detach()) <= 1e-13


def test_a_step_is_symplectic(parts: tuple[Velocity, Force]) -> None:
    func = Whole(*parts)

    def flow(flat: torch.Tensor) -> torch.Tensor:
        return torch.cat(odeint(func, (flat[:3], flat[3:]), [0.0, 0.5], method="yoshida4", last_only=True))

    jacobian: Any = torch.autograd.functional.jacobian(flow, random(6))
    one, zero = torch.eye(3, dtype=D), torch.zeros(3, 3, dtype=D)
    form = torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])
    assert float((jacobian.T @ form @ jacobian - form).abs().max()) <= 1e-13


def test_second_derivatives_and_forward_mode_are_those_of_plain_torch(parts: tuple[Velocity, Force]) -> None:
    velocity, force = parts
    func, (q, p), tangent = Separable(position=velocity, momentum=force), start(), random(2, 3, seed=8)

    def energy(states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.sin(torch.stack(states)).sum()

    def ours(q: torch.Tensor) -> torch.Tensor:
        return energy(odeint(func, (q, p.detach()), TIMES, method="leapfrog", step_size=STEP_SIZE))

    def plain(q: torch.Tensor) -> torch.Tensor:
        return energy(odeint_symplectic(velocity, force, (q, p.detach()), TIMES, STEPS["leapfrog"], STEP_SIZE))

    products = [torch.autograd.functional.hvp(loss, q.detach(), tangent)[1] for loss in (ours, plain)]
    assert distance(*products) <= 1e-12
    along = [torch.func.jvp(loss, (q.detach(),), (tangent,))[1].detach() for loss in (ours, plain)]
    assert distance(*along) <= 1e-12


def test_a_state_in_float32_and_an_f_in_another_type_are_allowed(parts: tuple[Velocity, Force]) -> None:
    func, u0 = Separable(position=parts[0], momentum=parts[1]), start()
    wanted = torch.stack(odeint(func, u0, TIMES, method="leapfrog", step_size=STEP_SIZE))
    for settings in ({"state_dtype": torch.float32}, {"compute_dtype": torch.float32}):
        found = torch.stack(odeint(func, u0, TIMES, method="leapfrog", step_size=STEP_SIZE, **settings))
        assert 0 < distance(found, wanted.detach()) < 1e-5
        assert found.dtype == D


@pytest.mark.nightly
def test_compiled_steps_are_those_that_are_not_compiled(parts: tuple[Velocity, Force]) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(random(3, 3))

        def forward(self, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
            return -torch.tanh(q @ self.weight) + torch.cos(t)

    func = Separable(position=lambda t, p: p / (1 + p * p).sqrt(), momentum=Plain())
    u0, parameters = start(), list(func.parameters())
    found, wanted = (
        derivatives(NeuralODE(func, method="leapfrog", step_size=0.1, compile=compiles)(u0, TIMES), [*u0, *parameters])
        for compiles in (True, False)
    )
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


PAIR = (torch.ones(2, dtype=D), torch.ones(2, dtype=D))


@pytest.mark.parametrize(
    ("u0", "settings", "complaint"),
    [
        (PAIR[0], {}, "method = 'leapfrog': u0 must be a pair (q, p) of two tensors of one shape, got one tensor"),
        ((*PAIR, PAIR[0], PAIR[0]), {}, "method = 'leapfrog': u0 must be a pair (q, p) of two tensors of one shape, "),
        ((PAIR[0], torch.ones(3, dtype=D)), {}, "method = 'leapfrog': u0 must be a pair (q, p) of two tensors of one"),
        (PAIR, {"rtol": 1e-3}, "method = 'leapfrog': has no error estimate to adapt steps to (rtol, atol)"),
        (PAIR, {"rtol": 1e-3, "adaptor": "pid"}, "method = 'leapfrog': has no error estimate for a step rule"),
        (PAIR, {"mass": 2.0}, "mass: method = 'leapfrog' is explicit and takes no mass matrix"),
        (PAIR, {"preconditioner": "block"}, "preconditioner: method = 'leapfrog' is explicit and solves no equations"),
        (PAIR, {"newton": "batch"}, "newton = 'batch': method = 'leapfrog'"),
        (PAIR, {"options": {"ts_rk_type": "4"}}, "options: 'ts_rk_type': nothing reads it with this method"),
        (PAIR, {"options": {"ts_type": "rk"}}, "options: 'ts_type': choose the method by name"),
        (PAIR, {"options": {"ksp_type": "cg"}}, "options: 'ksp_type': explicit methods solve no equations"),
    ],
)
def test_what_a_symplectic_method_cannot_do_is_refused(u0: Any, settings: dict[str, Any], complaint: str) -> None:
    def func(t: torch.Tensor, u: Any) -> Any:
        return tuple(-part for part in u) if isinstance(u, tuple) else -u

    with torch.no_grad(), pytest.raises(ConfigurationError) as caught:
        odeint(func, u0, [0.0, 1.0], method="leapfrog", **settings)
    assert str(caught.value).startswith(complaint), str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_in_inference_mode_are_those_of_no_grad(parts: tuple[Velocity, Force]) -> None:
    node = NeuralODE(Separable(position=parts[0], momentum=parts[1]), method="yoshida4", step_size=0.25)
    with torch.no_grad():
        wanted = node(start(), TIMES)
    with torch.inference_mode():
        found = node(start(), TIMES)
    assert identical([part.clone() for part in found], wanted)


def test_parts_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(TypeError, match=r"momentum must be callable as momentum\(t, q\)"):
        Separable(position=lambda t, p: p, momentum=3.0)  # type: ignore[arg-type]


def test_other_methods_take_a_separable_function_whole(parts: tuple[Velocity, Force]) -> None:
    u0 = tuple(part.detach() for part in start())
    found = odeint(Separable(position=parts[0], momentum=parts[1]), u0, TIMES, method="rk4", step_size=STEP_SIZE)
    wanted = odeint(Whole(*parts), u0, TIMES, method="rk4", step_size=STEP_SIZE)
    assert identical([part.detach() for part in found], [part.detach() for part in wanted])
