"""Values and gradients of every implicit method against dense plain torch and against difference quotients."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist import NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.ode import adaptive_pass
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.time_grid import TimeGrid
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.collocation import COLLOCATION, Collocation
from tests.oracles.differences import directional_derivative
from tests.oracles.dirk_tableaux import DIRK, OWN_DIRK
from tests.oracles.implicit import (
    BACKWARD_EULER,
    CRANK_NICOLSON,
    MIDPOINT,
    Theta,
    consistent_state,
    diagonal_mass,
    odeint_implicit,
    samplewise_mass,
)
from tests.oracles.implicit_tableaux import ImplicitTableau
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.stiff_right_hand_sides import Constrained, Decay, StiffNetwork
from tests.tiers import at_night

# Tolerances at which what is left of the equations is rounding.
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-13, "ksp_atol": 1e-50}
TIMES, STEP_SIZE = [0.0, 0.2, 0.5], 0.2

ORACLES: dict[str, Theta | ImplicitTableau | Collocation] = {
    "beuler": BACKWARD_EULER,
    "cn": CRANK_NICOLSON,
    "theta": MIDPOINT,
    **{f"arkimex_{name}": table for name, table in ARKIMEX.items()},
    **{f"dirk_{name}": table for name, table in DIRK.items()},
    **OWN_DIRK,
    **COLLOCATION,
}
# All methods are compared with plain torch.
OF_EACH_KIND = [
    "beuler",
    "cn",
    "theta",
    "arkimex_3",
    "arkimex_ars443",
    "dirk_s212",
    "dirk_es324sal",
    "gauss4",
    "radau5",
]
SPLIT = [name for name in ORACLES if name.startswith("arkimex")]
THETAS: dict[str, tuple[dict[str, Any], Theta]] = {
    "midpoint": ({}, MIDPOINT),
    "0.6": ({"ts_theta_theta": 0.6}, Theta(0.6, endpoint=False)),
    "0.6 endpoint": ({"ts_theta_theta": 0.6, "ts_theta_endpoint": None}, Theta(0.6, endpoint=True)),
    "0.3 endpoint": ({"ts_theta_theta": 0.3, "ts_theta_endpoint": None}, Theta(0.3, endpoint=True)),
    "1": ({"ts_theta_theta": 1.0}, BACKWARD_EULER),
}


@pytest.fixture
def network() -> StiffNetwork:
    return StiffNetwork()


@pytest.fixture
def u0() -> torch.Tensor:
    return random(2, 3)


def split(network: StiffNetwork) -> SplitFunction:
    return SplitFunction(implicit=network.stiff, explicit=network.other)


def agree(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], tolerance: float = 1e-10) -> bool:
    return all(distance(f, w) <= tolerance for f, w in zip(found, wanted, strict=True))


def test_every_implicit_method_with_an_adjoint_has_an_oracle() -> None:
    verified = {name for name, method in METHODS.items() if method.implicit and method.adjoint == "verified"}
    assert verified == set(ORACLES)


@pytest.mark.parametrize("name", ORACLES)
def test_values_and_gradients_are_those_of_plain_torch(name: str, network: StiffNetwork, u0: torch.Tensor) -> None:
    # One step of a method of many stages says enough.
    parameters, times = list(network.parameters()), TIMES[:2] if METHODS[name].stages > 8 else TIMES

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(network, u, times, method=name, step_size=STEP_SIZE, options=TIGHT)

    wanted = gradients(lambda u: odeint_implicit(network, u, times, ORACLES[name], STEP_SIZE), u0, parameters)
    assert agree(gradients(solve, u0, parameters), wanted)


@pytest.mark.parametrize(
    "name", ["beuler", "cn", "theta", "arkimex_ars122", "arkimex_3", "dirk_s212", "dirk_es325sal", "gauss6"]
)
def test_time_may_run_backward(name: str, u0: torch.Tensor) -> None:
    network, other, times = Network(), Network(seed=1), [0.5, 0.2, 0.0]
    parameters, additive = [*network.parameters(), *other.parameters()], name in SPLIT
    function = SplitFunction(implicit=network, explicit=other)

    def plain(u: torch.Tensor) -> torch.Tensor:
        whole = network if additive else function
        return odeint_implicit(whole, u, times, ORACLES[name], STEP_SIZE, explicit=other if additive else None)

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(function, u, times, method=name, step_size=STEP_SIZE, options=TIGHT)

    assert agree(gradients(solve, u0, parameters), gradients(plain, u0, parameters))


@pytest.mark.parametrize("name", SPLIT)
def test_a_split_function_is_implicit_in_one_part_and_explicit_in_the_other(
    name: str, network: StiffNetwork, u0: torch.Tensor
) -> None:
    parameters = list(network.parameters())

    def plain(u: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(network.stiff, u, TIMES, ORACLES[name], STEP_SIZE, explicit=network.other)

    found = gradients(
        lambda u: odeint(split(network), u, TIMES, method=name, step_size=STEP_SIZE, options=TIGHT), u0, parameters
    )
    assert agree(found, gradients(plain, u0, parameters))


@pytest.mark.parametrize("trained", ["stiff", "other", "neither"])
@pytest.mark.parametrize("name", ["arkimex_l2", "arkimex_3"])
def test_parameters_may_be_in_either_part_of_a_split_function(
    name: str, trained: str, network: StiffNetwork, u0: torch.Tensor
) -> None:
    network.stiff.requires_grad_(trained == "stiff")
    network.other.requires_grad_(trained == "other")
    parameters = [p for p in network.parameters() if p.requires_grad]

    def plain(u: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(network.stiff, u, TIMES, ORACLES[name], STEP_SIZE, explicit=network.other)

    found = gradients(
        lambda u: odeint(split(network), u, TIMES, method=name, step_size=STEP_SIZE, options=TIGHT), u0, parameters
    )
    assert agree(found, gradients(plain, u0, parameters))


@pytest.mark.parametrize("name", ["rk4", "cn", "dirk_es213sal", "radau3"])
def test_other_methods_integrate_the_sum_of_a_split_function(
    name: str, network: StiffNetwork, u0: torch.Tensor
) -> None:
    parameters = list(network.parameters())
    options = {} if name == "rk4" else TIGHT

    def solve(func: nn.Module) -> tuple[torch.Tensor, ...]:
        return gradients(
            lambda u: odeint(func, u, [0.0, 0.02], method=name, step_size=0.01, options=options), u0, parameters
        )

    assert agree(solve(split(network)), solve(network), 1e-12)


@pytest.mark.parametrize("name", ["arkimex_ars122", "arkimex_5"])
def test_the_implicit_part_may_be_a_matrix_of_petsc(name: str, u0: torch.Tensor) -> None:
    dense = random(6, 6, seed=3) - 20 * torch.eye(6, dtype=torch.float64)
    matrix = PETSc.Mat().createDense((6, 6), array=dense.numpy().copy(), comm=PETSc.COMM_SELF)
    matrix.assemble()
    other = Network()
    function, parameters = SplitFunction(implicit=matrix, explicit=other), list(other.parameters())

    def linear(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (dense @ u.reshape(-1)).reshape(u.shape)

    def plain(u: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(linear, u, TIMES, ORACLES[name], STEP_SIZE, explicit=other)

    found = gradients(
        lambda u: odeint(function, u, TIMES, method=name, step_size=STEP_SIZE, options=TIGHT), u0, parameters
    )
    assert agree(found, gradients(plain, u0, parameters))


@pytest.mark.parametrize("choice", THETAS)
def test_theta_methods_take_any_theta_with_the_endpoint_and_without(
    choice: str, network: StiffNetwork, u0: torch.Tensor
) -> None:
    options, method = THETAS[choice]
    parameters = list(network.parameters())

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(network, u, TIMES, method="theta", step_size=0.02, options={**TIGHT, **options})

    wanted = gradients(lambda u: odeint_implicit(network, u, TIMES, method, 0.02), u0, parameters)
    assert agree(gradients(solve, u0, parameters), wanted)


@pytest.mark.parametrize("name", at_night(ORACLES, OF_EACH_KIND))
def test_gradients_are_those_of_difference_quotients(name: str, network: StiffNetwork, u0: torch.Tensor) -> None:
    names, parameters = zip(*network.named_parameters(), strict=True)

    def part(child: str, values: tuple[torch.Tensor, ...]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        own = {key.removeprefix(f"{child}."): v for key, v in zip(names, values, strict=True) if key.startswith(child)}
        return lambda t, u: torch.func.functional_call(network.get_submodule(child), own, (t, u))

    def loss(start: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        function = SplitFunction(implicit=part("stiff", values), explicit=part("other", values))
        solution = odeint(function, start, [0.0, 0.2], method=name, step_size=STEP_SIZE, params=values, options=TIGHT)
        return torch.sin(solution).sum()

    point = [u0.clone().requires_grad_(), *parameters]
    direction = [random(*value.shape, seed=7 + k) for k, value in enumerate(point)]
    found = torch.autograd.grad(loss(*point), point)
    along = float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))
    assert along == pytest.approx(directional_derivative(loss, point, direction, step=3e-4), rel=1e-7)


MASSES = {
    "diagonal": torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64).expand(2, 3),
    "dense": torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3, seed=2),
}
MASS_METHODS: dict[str, tuple[str, dict[str, Any], Theta | Collocation]] = {
    "beuler": ("beuler", {}, BACKWARD_EULER),
    "cn": ("cn", {}, CRANK_NICOLSON),
    **{f"theta {choice}": ("theta", *THETAS[choice]) for choice in ("midpoint", "0.6", "0.6 endpoint")},
    **{name: (name, {}, COLLOCATION[name]) for name in ("gauss4", "radau5")},
}


def dense_mass(mass: torch.Tensor) -> torch.Tensor:
    return samplewise_mass(mass, 2) if mass.shape == (3, 3) else diagonal_mass(mass)


def matrix_of(dense: torch.Tensor) -> PETSc.Mat:
    matrix = PETSc.Mat().createAIJ(tuple(dense.shape), comm=PETSc.COMM_SELF)
    matrix.setUp()
    for i, row in enumerate(dense.tolist()):
        for j, entry in enumerate(row):
            if entry != 0:
                matrix[i, j] = entry
    matrix.assemble()
    return matrix


@pytest.mark.parametrize("as_matrix", [False, True], ids=["tensor", "Mat"])
@pytest.mark.parametrize("kind", MASSES)
@pytest.mark.parametrize("chosen", MASS_METHODS)
def test_a_mass_matrix_is_that_of_plain_torch(
    chosen: str, kind: str, as_matrix: bool, network: StiffNetwork, u0: torch.Tensor
) -> None:
    name, options, method = MASS_METHODS[chosen]
    parameters, dense = list(network.parameters()), dense_mass(MASSES[kind])
    mass = matrix_of(dense) if as_matrix else MASSES[kind]

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(network, u, TIMES, method=name, step_size=STEP_SIZE, options={**TIGHT, **options}, mass=mass)

    wanted = gradients(lambda u: odeint_implicit(network, u, TIMES, method, STEP_SIZE, mass=dense), u0, parameters)
    assert agree(gradients(solve, u0, parameters), wanted)


SQUARE = torch.eye(3, dtype=torch.float64) + 0.3 * random(3, 3, seed=2)
SINGULAR = {
    "diagonal": torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64).expand(2, 3),
    "dense": torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)) @ SQUARE,
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("chosen", MASS_METHODS)
def test_algebraic_equations_are_solved_and_differentiated_through(chosen: str, kind: str, u0: torch.Tensor) -> None:
    name, options, method = MASS_METHODS[chosen]
    constrained, mass = Constrained(), SINGULAR[kind]
    parameters, dense = list(constrained.parameters()), dense_mass(SINGULAR[kind])
    start = consistent_state(constrained, u0, 0.0, dense).detach()

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(constrained, u, TIMES, method=name, step_size=STEP_SIZE, options={**TIGHT, **options}, mass=mass)

    def plain(u: torch.Tensor) -> torch.Tensor:
        return odeint_implicit(constrained, u, TIMES, method, STEP_SIZE, mass=dense)

    assert agree(gradients(solve, start, parameters), gradients(plain, start, parameters))


@pytest.mark.parametrize("name", ["cn", "theta", "arkimex_3", "dirk_es213sal", "radau3"])
def test_the_gradient_has_the_same_bits_under_every_budget(name: str, network: StiffNetwork, u0: torch.Tensor) -> None:
    function, parameters = split(network), list(network.parameters())

    def gradient(trajectory: Trajectory) -> tuple[torch.Tensor, ...]:
        node = NeuralODE(function, method=name, step_size=0.1, options=TIGHT, trajectory=trajectory)
        return gradients(lambda u: node(u, TIMES), u0, parameters)

    wanted = gradient(Trajectory(keep="solution"))
    for trajectory in (
        Trajectory(keep="stages"),
        Trajectory(keep="graph"),
        Trajectory(ram_slots=2, disk_slots=0),
        Trajectory(ram_slots=0, disk_slots=2),
    ):
        assert identical(gradient(trajectory), wanted), trajectory


@pytest.mark.parametrize("name", ["cn", "arkimex_3", "arkimex_a2", "dirk_s212", "dirk_es324sal"])
def test_with_error_control_the_gradient_is_that_of_the_accepted_steps(
    name: str, network: StiffNetwork, u0: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[TimeGrid] = []

    def remembering(*arguments: Any) -> TimeGrid:
        grids.append(TimeGrid(*arguments))
        return grids[-1]

    monkeypatch.setattr(adaptive_pass, "TimeGrid", remembering)
    parameters = list(network.parameters())

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(split(network), u, [0.0, 0.05, 0.1], method=name, rtol=1e-2, atol=1e-2, options=TIGHT)

    found = gradients(solve, u0, parameters)
    (grid,) = grids
    assert len(grid.starts) > 2

    def plain(u: torch.Tensor) -> torch.Tensor:
        times = [*grid.starts, 0.1]
        if name in SPLIT:
            states = odeint_implicit(network.stiff, u, times, ORACLES[name], explicit=network.other)
        else:
            states = odeint_implicit(network, u, times, ORACLES[name])
        return states[[0, *sorted(number for number in grid.outputs if number > 0)]]

    assert agree(found, gradients(plain, u0, parameters))


def test_a_stiff_part_far_faster_than_the_step_leaves_the_gradient_exact(u0: torch.Tensor) -> None:
    decay = Decay()
    with torch.no_grad():
        decay.logarithms_of_rates.add_(4.0)
    parameters = list(decay.parameters())
    for name in ("beuler", "dirk_es325sal", "arkimex_prssp2", "gauss4", "radau5"):

        def solve(u: torch.Tensor, name: str = name) -> torch.Tensor:
            return odeint(decay, u, TIMES, method=name, step_size=STEP_SIZE, options=TIGHT)

        def plain(u: torch.Tensor, name: str = name) -> torch.Tensor:
            return odeint_implicit(decay, u, TIMES, ORACLES[name], STEP_SIZE)

        assert agree(gradients(solve, u0, parameters), gradients(plain, u0, parameters))
