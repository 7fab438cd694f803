"""A program that was written for torchdiffeq runs with the import line alone changed."""

from __future__ import annotations

import gc
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
import torchdiffeq
from torch import nn

from pnode_dist import ConfigurationError, Trajectory
from pnode_dist import torchdiffeq as here
from pnode_dist.errors import StepSizeError
from pnode_dist.torchdiffeq import odeint, odeint_adjoint
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.unit.torchdiffeq.recorded import Recorded

TIMES = torch.tensor([0.0, 0.4, 1.0, 2.5], dtype=torch.float64)
U0 = random(2, 3)


class GivenSteps(Network):
    """`Network` with the callback of steps that are given."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[float, torch.Tensor, float]] = []

    def callback_step(self, t: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> None:
        self.taken.append((t.item(), y.detach().clone(), h.item()))


class Uncallable(Network):
    """`Network` with a callback that is no function."""

    callback_step = 3


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_arguments_and_defaults_are_those_of_torchdiffeq_and_two_more(name: str) -> None:
    theirs = inspect.signature(getattr(torchdiffeq, name)).parameters.values()
    ours = inspect.signature(getattr(here, name)).parameters
    for argument in theirs:
        assert (ours[argument.name].default, ours[argument.name].kind) == (argument.default, argument.kind)
    assert [*ours][len(theirs) :] == ["partition", "trajectory"]


@pytest.mark.slow
def test_a_spiral_that_needs_small_steps_is_solved_by_default() -> None:
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    t = torch.linspace(0.0, 10.0, 20)
    found = odeint(lambda t, y: y**3 @ matrix, torch.tensor([[2.0, 0.0]]), t)
    exact = torchdiffeq.odeint(
        lambda t, y: y**3 @ matrix.double(), torch.tensor([[2.0, 0.0]]).double(), t.double(), rtol=1e-10, atol=1e-12
    )
    assert found.dtype == torch.float32
    assert distance(found.double(), exact) < 1e-5


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
@pytest.mark.parametrize("decreasing", [False, True])
def test_gradients_by_default_are_those_of_back_propagation(solver: Callable[..., Any], decreasing: bool) -> None:
    network, times = Network(), TIMES.flip(0) if decreasing else TIMES

    def solved(solver: Callable[..., Any], **tolerances: float) -> tuple[torch.Tensor, ...]:
        t = times.clone().requires_grad_()
        return gradients(lambda u: solver(network, u, t, **tolerances), U0, [*network.parameters(), t])

    wanted = solved(torchdiffeq.odeint, rtol=1e-11, atol=1e-12)
    for found, exact in zip(solved(solver), wanted, strict=True):
        assert distance(found, exact) < 1e-5


def test_the_gradient_is_that_of_the_accepted_steps_in_plain_torch() -> None:
    network, t = Recorded(), torch.tensor([0.0, 3.0], dtype=torch.float64)
    found = gradients(lambda u: odeint(network, u, t, rtol=1e-4)[-1], U0, list(network.parameters()))
    steps = network.accepted
    assert len(steps) > 4
    assert network.rejected

    def along(u: torch.Tensor) -> torch.Tensor:
        for start, size in steps:
            u = odeint_plain(network, u, [start, start + size], TABLEAUX["5dp"], size)[-1]
        return u

    wanted = gradients(along, U0, list(network.parameters()))
    assert distance(found, wanted) < 1e-12


def test_callbacks_are_not_called_in_the_backward_pass() -> None:
    budget = Trajectory(keep="solution", ram_slots=1)
    for method, network in (("dopri5", Recorded()), ("rk4", GivenSteps())):
        end = odeint_adjoint(network, U0.clone().requires_grad_(), TIMES, method=method, trajectory=budget)[-1]
        forward = len(network.taken)
        assert forward >= 3
        end.sum().backward()
        assert len(network.taken) == forward


@pytest.mark.parametrize(("method", "dtype"), [("dopri5", torch.float32), ("dopri8", torch.float64)])
def test_the_gradient_has_the_same_bits_within_a_budget(method: str, dtype: torch.dtype) -> None:
    network, start = Network(dtype=dtype), U0.to(dtype)

    def solved(trajectory: Trajectory | None) -> tuple[torch.Tensor, ...]:
        tolerances = {"method": method, "rtol": 1e-4, "atol": 1e-6}
        return gradients(
            lambda u: odeint(network, u, TIMES, trajectory=trajectory, **tolerances), start, list(network.parameters())
        )

    ample = solved(None)
    assert identical(solved(Trajectory(keep="solution", ram_slots=2)), ample)
    # Stage by stage the same numbers are added in another order.
    assert distance(solved(Trajectory(keep="stages")), ample) <= 20 * torch.finfo(dtype).eps


class Pair(nn.Module):
    """A tuple state of a matrix and a number, of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        u, total = state
        return self.network(t, u) - total / 1e4, 1e3 * u.square().sum()


@pytest.mark.parametrize(
    "tolerances",
    [
        {},
        {"rtol": 1e-8, "atol": (1e-9, 1e-5)},
        {"rtol": torch.tensor(1e-8, dtype=torch.float64), "atol": torch.tensor([1e-9, 1e-6], dtype=torch.float64)},
        {"rtol": (1e-8, 1e-8), "atol": (torch.full((6,), 1e-9, dtype=torch.float64), 1e-6)},
        {"rtol": 0.0, "atol": (1e-9, 1e-5)},
    ],
    ids=["default", "tuple", "tensors", "flat", "absolute"],
)
def test_a_tuple_state_and_its_tolerances_are_those_of_torchdiffeq(tolerances: dict[str, Any]) -> None:
    pair, start = Pair(), (U0, torch.tensor(0.5, dtype=torch.float64))
    wanted = torchdiffeq.odeint(pair, start, TIMES, options={"step_t": TIMES[1:]}, **tolerances)
    found = odeint(pair, start, TIMES, **tolerances)
    assert isinstance(found, tuple)
    for part, exact in zip(found, wanted, strict=True):
        assert distance(part, exact) < 1e-6


@pytest.mark.parametrize("bad", [0, 1])
def test_a_part_of_a_tuple_that_becomes_nan_is_an_error_wherever_it_is(bad: int) -> None:
    def func(t: torch.Tensor, y: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.log(0.5 - t) * part if number == bad else -part for number, part in enumerate(y))

    with pytest.raises(StepSizeError, match=r"its size fell to .* infinite there$"):
        odeint(func, (U0, U0), TIMES)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_a_tuple_state_is_interpolated_part_by_part(interp: str) -> None:
    pair, start = Pair(), (U0, torch.tensor(0.5, dtype=torch.float64))
    settings = {"method": "rk4", "options": {"step_size": 0.15, "interp": interp}}
    wanted = torchdiffeq.odeint(pair, start, TIMES, **settings)
    for part, exact in zip(odeint(pair, start, TIMES, **settings), wanted, strict=True):
        assert distance(part, exact) < 1e-13


def test_tolerances_of_a_tensor_state_may_differ_between_entries() -> None:
    network, atol = Recorded(), torch.full((2, 3), 1e-3, dtype=torch.float64)
    odeint(network, U0, TIMES[[0, 3]], rtol=1e-3, atol=atol)
    loose = len(network.accepted)
    atol[0, 0] = 1e-10
    odeint(network, U0, TIMES[[0, 3]], rtol=0.0, atol=atol)
    assert len(network.accepted) - loose > 2 * loose


def test_parts_of_different_types_are_promoted_to_one() -> None:
    start = torch.ones(2), torch.ones(3, dtype=torch.float64)
    found = odeint(lambda t, y: (-y[0], -y[1]), start, TIMES)
    wanted = torchdiffeq.odeint(lambda t, y: (-y[0], -y[1]), start, TIMES)
    for part, exact in zip(found, wanted, strict=True):
        assert part.dtype == exact.dtype == torch.float64
        assert distance(part, exact) < 1e-6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("dopri5", {"jump_t": [0.7]}, marks=pytest.mark.nightly),
        ("rk4", {"step_size": 0.3, "interp": "cubic"}),
    ],
)
def test_second_derivatives_and_transforms_go_through_pieces_and_interpolation(
    method: str, options: dict[str, Any]
) -> None:
    network = Network()

    def loss(solver: Callable[..., Any], u: torch.Tensor, **tolerances: float) -> torch.Tensor:
        return torch.sin(solver(network, u, TIMES, method=method, options=options, **tolerances)).sum()

    def second(solver: Callable[..., Any], **tolerances: float) -> torch.Tensor:
        u = U0.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(solver, u, **tolerances), u, create_graph=True)
        return torch.autograd.grad(first.square().sum(), u)[0]

    wanted = second(torchdiffeq.odeint, rtol=1e-10, atol=1e-12)
    assert distance(second(odeint), wanted) < 1e-5
    (gradient,) = torch.autograd.grad(loss(odeint, start := U0.clone().requires_grad_()), start)
    along = torch.func.jvp(lambda u: loss(odeint, u), (U0,), (torch.ones_like(U0),))[1]
    assert distance(along, gradient.sum()) < 1e-12
    assert distance(torch.func.grad(lambda u: loss(odeint, u))(U0), gradient) < 1e-12


@pytest.mark.nightly
def test_compiled_code_calls_the_solve_outside_its_graph() -> None:
    network = Network()

    def doubled(u: torch.Tensor) -> torch.Tensor:
        return 2 * odeint_adjoint(network, 3 * u, TIMES)[-1]

    assert torch.equal(torch.compile(doubled, backend="eager")(U0), doubled(U0))


def test_one_time_returns_the_initial_state() -> None:
    for method in ("dopri5", "rk4"):
        found = odeint(
            Network(), U0, TIMES[:1], method=method, options=None if method == "dopri5" else {"step_size": 1}
        )
        assert torch.equal(found, U0[None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": [0.0, 1.0]}, "t must be a one-dimensional floating-point tensor, got list"),
        ({"t": torch.tensor([0, 1])}, "got torch.int64"),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, "t must increase or decrease strictly"),
        ({"t": torch.tensor([[0.0, 1.0]])}, "t must be one-dimensional"),
        ({"rtol": 0.0, "atol": 0.0}, "one of them must be positive"),
        ({"rtol": -1e-3}, "rtol = -0.001: must be positive or zero"),
        ({"atol": torch.ones(4)}, r"atol: shape \(4,\) does not broadcast"),
        ({"atol": torch.ones(3, requires_grad=True)}, "atol: cannot require a gradient"),
        ({"y0": (U0, U0), "rtol": (1e-3,)}, "rtol: 1 tolerances for a state of 2 parts"),
        ({"y0": ()}, "u0 must be a tensor or a tuple of tensors"),
        ({"y0": 1.0}, "u0 must be a tensor or a tuple of tensors"),
        ({"y0": (U0, U0), "rtol": None}, "rtol = None: must be a number"),
        ({"rtol": None}, "rtol = None: must be a number, a tensor, or one for each part of y0"),
        ({"atol": "small", "method": "rk4"}, "atol = 'small': must be a number"),
        ({"y0": (U0, U0), "atol": (1e-3, "small")}, r"atol = \(0.001, 'small'\): must be a number"),
        ({"partition": 3}, "partition = 3: must be a partition of pnode_dist, or None"),
        ({"trajectory": "graph"}, "trajectory = 'graph': must be a pnode_dist.Trajectory, or None"),
        ({"options": {"norm": lambda y: y}}, r"norm returned a tensor of shape \(2, 3\): must return a number"),
        ({"options": {"norm": lambda y: None}}, "norm returned NoneType: must return a number"),
        ({"func": Uncallable()}, "func.callback_step = 3: must be a function of t, y and the size of the step"),
        ({"event_fn": 3}, "event_fn = 3: must be a function of t and y"),
        ({"event_fn": lambda t, y: 1.0}, "event_fn returned float: must return a real tensor"),
        ({"event_fn": lambda t, y: 0 * y}, r"event_fn: an entry is zero at t\[0\]"),
        ({"event_fn": lambda t, y: y.sum(), "method": "rk4"}, "event_fn: a method with given steps needs"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"func": Network(), "y0": U0, "t": TIMES, **arguments}
    for solver in (odeint, odeint_adjoint):
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            solver(**given)
        assert "\n" not in str(caught.value)


def test_a_function_without_a_counterpart_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="odeint_dense: no interpolant"):
        here.odeint_dense(Network(), U0, TIMES[0], TIMES[1])


def test_settings_of_an_adjoint_equation_are_reported_to_have_no_effect() -> None:
    network = Network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = odeint_adjoint(network, U0, TIMES)
    with pytest.warns(UserWarning, match="^adjoint_rtol, adjoint_options: no effect: the gradient is exact") as caught:
        found = odeint_adjoint(network, U0, TIMES, adjoint_rtol=1e-2, adjoint_options={"norm": "seminorm"})
    assert torch.equal(found, plain)
    assert caught[0].filename == __file__


def test_a_function_names_its_parameters_by_adjoint_params() -> None:
    network = Network()
    parameters = list(network.parameters())

    def function(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return network(t, u)

    with pytest.raises(ConfigurationError, match=r"func must be an instance of nn\.Module"):
        odeint_adjoint(function, U0, TIMES)
    wanted = gradients(lambda u: odeint(network, u, TIMES), U0, parameters)
    found = gradients(lambda u: odeint_adjoint(function, u, TIMES, adjoint_params=iter(parameters)), U0, parameters)
    assert identical(found, wanted)
    with pytest.raises(ConfigurationError, match=r"leaves out 1 tensors of func .*, of shapes \[3, 5\]: name them too"):
        odeint_adjoint(network, U0, TIMES, adjoint_params=parameters[:3])
    with pytest.raises(ConfigurationError, match="leaves out 4 tensors"):
        odeint_adjoint(function, U0, TIMES, adjoint_params=())
    network.outer.requires_grad_(False)
    assert odeint_adjoint(network, U0, TIMES, adjoint_params=parameters).requires_grad


@pytest.mark.parametrize(
    ("params", "got"),
    [
        (3, "got int"),
        (torch.ones(2), "got Tensor"),
        (["w"], "got an entry of type str"),
        (Network().named_parameters(), "got an entry of type tuple"),
    ],
)
def test_adjoint_params_that_are_no_tensors_are_refused(params: Any, got: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"adjoint_params: must be a sequence of tensors, .*, {got}$"):
        odeint_adjoint(Network(), U0, TIMES, adjoint_params=params)


def test_callbacks_that_nothing_would_call_are_reported_by_a_warning() -> None:
    network = Recorded()
    with pytest.warns(
        UserWarning, match=r"^func.callback_accept_step, func.callback_reject_step: never called: method"
    ):
        odeint(network, U0, TIMES, method="rk4")
    assert network.taken
    assert not network.accepted


@pytest.mark.parametrize(
    ("method", "options"), [("rk4", {"step_size": 0.3}), ("dopri5", {}), ("trapezoid", {"step_size": 0.3})]
)
def test_adjoint_callbacks_see_each_step_that_is_reversed(method: str, options: dict[str, Any]) -> None:
    network, reversed_steps = Recorded(), []

    def reverse(t: torch.Tensor, a: None, h: torch.Tensor) -> None:
        reversed_steps.append((t.item(), h.item()))
        assert a is None

    network.callback_step_adjoint = reverse
    u0 = U0.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odeint_adjoint(network, u0, TIMES, method=method, options=options)[-1].sum().backward()
    taken = network.accepted if method == "dopri5" else network.taken
    assert reversed_steps == taken[::-1]


@pytest.mark.parametrize("decreasing", [False, True])
def test_a_callback_sees_the_given_steps_of_torchdiffeq(decreasing: bool) -> None:
    ours, theirs, t = GivenSteps(), GivenSteps(), TIMES.flip(0) if decreasing else TIMES
    for solver, func in ((odeint, ours), (torchdiffeq.odeint, theirs)):
        solver(func, U0, t, method="rk4", options={"step_size": 0.3})
    assert len(ours.taken) == len(theirs.taken) == 9
    for found, wanted in zip(ours.taken, theirs.taken, strict=True):
        assert found[0] == pytest.approx(wanted[0], abs=1e-14)
        assert found[2] == pytest.approx(wanted[2], abs=1e-14)
        assert distance(found[1], wanted[1]) < 1e-13


def test_the_solver_of_a_function_is_freed_with_the_function() -> None:
    network = Network()
    odeint(network, U0.clone().requires_grad_(), TIMES)[-1].sum().backward()
    gone = ref(network)
    del network
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("call", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("method", ["rk4", "midpoint", "euler"])
def test_complex_states_are_solved_as_by_torchdiffeq(call: str, method: str) -> None:
    rate = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = rate

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 1j * self.rate * y * (1 + t)

    y0 = torch.tensor([1 + 0j, 2 - 1j], dtype=torch.complex128, requires_grad=True)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    settings = {"method": method, "options": {"step_size": 0.05}}
    found = getattr(here, call)(Turn(), y0, t, **settings)
    wanted = torchdiffeq.odeint(Turn(), y0, t, **settings)
    assert (found - wanted).abs().max() <= 1e-12
    gradients = [torch.autograd.grad(states.imag.sum(), [y0, rate]) for states in (found, wanted)]
    assert all((one - other).abs().max() <= 1e-12 for one, other in zip(*gradients, strict=True))


def test_a_norm_and_callbacks_get_complex_states() -> None:
    seen: list[torch.dtype] = []

    class Turn(nn.Module):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 1j * y

        def callback_step(self, t: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> None:
            seen.append(y.dtype)

    def norm(error: torch.Tensor) -> torch.Tensor:
        seen.append(error.dtype)
        return error.abs().max()

    y0 = torch.ones(2, dtype=torch.complex64)
    found = odeint(Turn(), y0, torch.tensor([0.0, 1.0]), options={"norm": norm})
    assert abs(found[-1, 0].item() - complex(math.cos(1), math.sin(1))) <= 1e-5
    assert set(seen) == {torch.complex64} or set(seen) == {torch.complex64, torch.complex128}
