"""Every way of writing a right-hand side: which tensors get a gradient, and what is said where one cannot be found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory, odeint
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 1.0]
Func = Callable[..., torch.Tensor]


def weight(seed: int = 21) -> torch.Tensor:
    return (random(3, 3, seed=seed) * 0.5).requires_grad_()


def check(
    func: Func,
    parameters: Sequence[torch.Tensor],
    args: tuple[Any, ...] = (),
    params: Sequence[torch.Tensor] | None = None,
    plain: Func | None = None,
) -> None:
    """The gradients with respect to u0 and `parameters` are those of back-propagation, step by step and at once."""
    u0 = random(2, 3)
    for step_size in (0.1, 5.0):
        found = gradients(
            lambda u, h=step_size: odeint(func, u, TIMES, step_size=h, args=args, params=params),  # type: ignore[misc]
            u0,
            parameters,
        )
        wanted = gradients(
            lambda u, h=step_size: odeint_plain(plain or func, u, TIMES, TABLEAUX["4"], h, args),  # type: ignore[misc]
            u0,
            parameters,
        )
        assert all(w.any() for w in wanted), "the case is trivial"
        assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))


class Holder:
    """An object that no search of closures looks into."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Field:
    """A right-hand side as a method of a plain object."""

    def __init__(self) -> None:
        self.matrix = weight()

    def derivative(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ self.matrix) - t * u

    __call__ = derivative


GLOBAL_WEIGHT = weight(5)


def reads_a_global(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.tanh(u @ GLOBAL_WEIGHT) - t * u


def test_a_module() -> None:
    network = Network()
    check(network, list(network.parameters()))


def test_a_module_of_modules_that_share_a_parameter() -> None:
    inner = nn.Linear(3, 3, dtype=torch.float64)
    pair = nn.Sequential(inner, nn.Tanh(), inner)
    check(lambda t, u: pair(u) * torch.cos(t), list(pair.parameters()))


def test_a_bound_method_of_a_module() -> None:
    network = Network()
    check(network.forward, list(network.parameters()))


def test_a_bound_method_of_a_plain_object() -> None:
    field = Field()
    check(field.derivative, [field.matrix])


def test_a_callable_object() -> None:
    field = Field()
    check(field, [field.matrix])


def test_a_closure_over_leaves() -> None:
    a, b = weight(1), weight(2)
    check(lambda t, u: torch.tanh(u @ a) @ b - t * u, [a, b])


def test_a_closure_over_a_function_that_closes_over_a_leaf() -> None:
    a = weight()

    def inner(u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ a)

    check(lambda t, u: inner(u) - t * u, [a])


def test_a_closure_over_a_module() -> None:
    network = Network()
    check(lambda t, u: -network(t, u), list(network.parameters()))


@pytest.mark.parametrize("make", [lambda p: 2 * p, lambda p: p @ p, torch.exp], ids=["scaled", "squared", "exp"])
def test_a_closure_over_an_intermediate_result(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    p = weight()
    u0 = random(2, 3)

    def both(solve: Callable[[Func, torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        derived = make(p)
        return gradients(lambda u: solve(lambda t, v: torch.tanh(v @ derived) - t * v, u), u0, [p])

    found = both(lambda func, u: odeint(func, u, TIMES, step_size=0.1))
    wanted = both(lambda func, u: odeint_plain(func, u, TIMES, TABLEAUX["4"], 0.1))
    assert distance(found[2], wanted[2]) <= 1e-12
    assert distance(found[1], wanted[1]) <= 1e-12


@pytest.mark.parametrize("make", [lambda p: 2 * p, lambda p: p @ p], ids=["scaled", "squared"])
def test_a_closure_over_an_intermediate_result_and_its_leaf(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    p = weight()
    u0 = random(2, 3)

    def both(solve: Callable[[Func, torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        derived = make(p)
        return gradients(lambda u: solve(lambda t, v: v @ derived + torch.sin(v @ p), u), u0, [p])

    found = both(lambda func, u: odeint(func, u, TIMES, step_size=0.1))
    wanted = both(lambda func, u: odeint_plain(func, u, TIMES, TABLEAUX["4"], 0.1))
    assert distance(found[2], wanted[2]) <= 1e-12


@pytest.mark.parametrize(
    "box",
    [
        lambda p: [p],
        lambda p: (p, 1),
        lambda p: {"w": p},
        lambda p: {"deep": [({"w": p},)]},
        lambda p: nn.ParameterList([nn.Parameter(p.detach().clone())]),
    ],
    ids=["list", "tuple", "dict", "nested", "parameter list"],
)
def test_a_closure_over_a_container(box: Callable[[torch.Tensor], Any]) -> None:
    container = box(weight())

    def inside(thing: Any) -> torch.Tensor:
        while not isinstance(thing, torch.Tensor):
            thing = next(iter(thing.values())) if isinstance(thing, dict) else thing[0]
        return thing

    check(lambda t, u: torch.tanh(u @ inside(container)) - t * u, [inside(container)])


def test_a_global_tensor() -> None:
    check(reads_a_global, [GLOBAL_WEIGHT])


def test_a_default_argument() -> None:
    a = weight()

    def func(t: torch.Tensor, u: torch.Tensor, matrix: torch.Tensor = a) -> torch.Tensor:
        return torch.tanh(u @ matrix) - t * u

    check(func, [a])


def test_a_partial_function() -> None:
    a, b = weight(1), weight(2)

    def func(left: torch.Tensor, t: torch.Tensor, u: torch.Tensor, *, right: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ left) @ right - t * u

    check(functools.partial(func, a, right=b), [a, b])


def test_extra_arguments_get_gradients() -> None:
    a, b = weight(1), weight(2)
    check(lambda t, u, x, more: torch.tanh(u @ x) @ more["b"] - t * u, [a, b], args=(a, {"b": b}))


def test_extra_arguments_that_are_intermediate_results_get_gradients() -> None:
    a, u0 = weight(1), random(2, 3)

    def func(t: torch.Tensor, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ x) - t * u

    found = gradients(lambda u: odeint(func, u, TIMES, args=(torch.exp(a),)), u0, [a])
    wanted = gradients(lambda u: odeint_plain(func, u, TIMES, TABLEAUX["4"], args=(torch.exp(a),)), u0, [a])
    assert distance(found, wanted) <= 1e-12


def test_a_tensor_hidden_in_an_object_is_found_or_asked_for() -> None:
    hidden = Holder(weight())

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ hidden.tensor) - t * u

    right_or_refused(func, [hidden.tensor])


def test_a_tensor_hidden_in_an_object_is_differentiated_when_named() -> None:
    hidden = Holder(weight())
    check(lambda t, u: torch.tanh(u @ hidden.tensor) - t * u, [hidden.tensor], params=(hidden.tensor,))


def test_an_intermediate_result_hidden_in_an_object_is_found_or_asked_for() -> None:
    p = weight()
    hidden = Holder(p)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ hidden.tensor) - t * u

    def prepare() -> None:
        hidden.tensor = p @ p

    right_or_refused(func, [p], prepare)


def test_an_intermediate_result_hidden_beside_its_own_leaf_is_found_or_asked_for() -> None:
    p = weight()
    hidden = Holder(p)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ hidden.tensor) - torch.sin(u @ p)

    def prepare() -> None:
        hidden.tensor = p @ p

    right_or_refused(func, [p], prepare)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_hidden_tensor_that_only_some_steps_use_is_found_or_asked_for(late: bool) -> None:
    hidden, p = Holder(weight(3)), weight()

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        steady = torch.tanh(u @ p)
        return steady + u @ hidden.tensor if (float(t) > 0.5) == late else steady

    right_or_refused(func, [p, hidden.tensor])


def test_a_hidden_tensor_is_not_lost_when_nothing_else_requires_a_gradient() -> None:
    hidden = Holder(weight())
    p = hidden.tensor

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ hidden.tensor)

    u0 = random(2, 3)
    (wanted,) = torch.autograd.grad(odeint_plain(func, u0, TIMES, TABLEAUX["4"]).sum() + (p**2).sum(), [p])
    try:
        # The regularising term alone would give a gradient, and a wrong one.
        (found,) = torch.autograd.grad(odeint(func, u0, TIMES).sum() + (p**2).sum(), [p])
    except ValueError as error:
        assert "params=" in str(error)  # noqa: PT017
    else:
        assert distance(found, wanted) <= 1e-12


def right_or_refused(func: Func, parameters: list[torch.Tensor], prepare: Callable[[], None] = lambda: None) -> None:
    """The gradient is either right or refused with the advice to name the parameters: never silently wrong."""
    solves = [(u, h, k) for u in (False, True) for h in (0.1, 5.0) for k in ("graph", "solution")]
    for requires_grad, step_size, keep in solves:
        u0 = random(2, 3).requires_grad_(requires_grad)
        prepare()
        wanted = torch.autograd.grad(
            odeint_plain(func, u0, TIMES, TABLEAUX["4"], step_size).sum(), parameters, allow_unused=True
        )
        prepare()
        try:
            solution = odeint(func, u0, TIMES, step_size=step_size, trajectory=Trajectory(keep=keep))
            found = torch.autograd.grad(solution.sum(), parameters, allow_unused=True)
        except (ValueError, RuntimeError) as error:
            assert "params=" in str(error), error  # noqa: PT017
        else:
            for f, w in zip(found, wanted, strict=True):
                assert (f is None) == (w is None)
                if f is not None and w is not None:
                    assert distance(f, w) <= 1e-12


def test_a_func_without_parameters_differentiates_the_initial_state() -> None:
    check(lambda t, u: torch.sin(t + u), [])


def test_a_func_without_parameters_and_a_u0_without_gradient_gives_a_plain_tensor() -> None:
    solution = odeint(lambda t, u: torch.sin(t + u), random(2, 3), TIMES)
    assert not solution.requires_grad


def test_parameters_get_a_gradient_when_u0_needs_none() -> None:
    network, u0 = Network(), random(2, 3)
    odeint(network, u0, TIMES).sum().backward()
    found = [p.grad for p in network.parameters()]
    wanted = torch.autograd.grad(odeint_plain(network, u0, TIMES, TABLEAUX["4"]).sum(), list(network.parameters()))
    assert distance(found, wanted) <= 1e-12
    assert u0.grad is None


def test_unused_parameters_get_no_gradient_or_zero() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(weight().detach()), nn.Parameter(weight().detach())

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return u @ self.used

    lazy = Lazy()
    odeint(lazy, random(2, 3), TIMES).sum().backward()
    assert lazy.used.grad is not None
    assert lazy.used.grad.any()
    assert lazy.unused.grad is None or not lazy.unused.grad.any()


def test_frozen_parameters_get_no_gradient_and_the_others_the_right_one() -> None:
    network, u0 = Network(), random(2, 3)
    network.inner.requires_grad_(False)
    rest = [network.bias, network.drift, network.outer]
    found = gradients(lambda u: odeint(network, u, TIMES), u0, rest)
    wanted = gradients(lambda u: odeint_plain(network, u, TIMES, TABLEAUX["4"]), u0, rest)
    assert distance(found, wanted) <= 1e-12
    odeint(network, u0, TIMES).sum().backward()
    assert network.inner.grad is None


def test_a_constant_func_that_ignores_the_state() -> None:
    rate = random(2, 3, seed=8).requires_grad_()
    u0 = random(2, 3).requires_grad_()
    solution = odeint(lambda t, u: t * rate, u0, [0.0, 2.0])
    solution[-1].sum().backward()
    assert u0.grad is not None
    assert torch.equal(u0.grad, torch.ones_like(u0))
    assert rate.grad is not None
    torch.testing.assert_close(rate.grad, torch.full_like(u0, 2.0), rtol=1e-14, atol=0)


def test_a_func_whose_result_needs_no_gradient_passes_the_cotangent_on() -> None:
    u0 = random(2, 3).requires_grad_()
    odeint(lambda t, u: torch.ones_like(u), u0, TIMES)[-1].sum().backward()
    assert u0.grad is not None
    assert torch.equal(u0.grad, torch.ones_like(u0))


def test_a_func_that_detaches_gets_the_gradient_that_plain_torch_gives() -> None:
    p, u0 = weight(), random(2, 3)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u.detach() @ p)

    found = gradients(lambda u: odeint(func, u, TIMES, step_size=0.2), u0, [p])
    wanted = gradients(lambda u: odeint_plain(func, u, TIMES, TABLEAUX["4"], 0.2), u0, [p])
    assert distance(found, wanted) <= 1e-12


@pytest.mark.parametrize("grad", [False, True])
def test_a_result_of_another_shape_is_refused_with_both_shapes(grad: bool) -> None:
    u0 = random(2, 3).requires_grad_(grad)
    with pytest.raises(ValueError, match="shape") as caught:
        odeint(lambda t, u: u.sum(-1), u0, TIMES)
    assert "(2,)" in str(caught.value)
    assert "(2, 3)" in str(caught.value)


def test_a_result_that_would_broadcast_is_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 3\)"):
        odeint(lambda t, u: u[0], random(2, 3), TIMES)


@pytest.mark.parametrize("wrong", [None, 1.0, "u", (torch.zeros(2, 3, dtype=torch.float64),) * 2])
def test_a_result_that_is_no_tensor_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="func must return a tensor like u"):
        odeint(lambda t, u: wrong, random(2, 3), TIMES)


def test_a_result_with_too_few_parts_is_refused() -> None:
    start = (random(2), random(3))
    with pytest.raises(TypeError, match="func must return a tuple of 2 tensors"):
        odeint(lambda t, u: (u[0],), start, TIMES)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        odeint(lambda t, u: (u[0], u[0]), start, TIMES)


@pytest.mark.parametrize("func", [None, 3, torch.zeros(3)])
def test_something_that_cannot_be_called_is_refused(func: Any) -> None:
    with pytest.raises(TypeError, match="func must be callable"):
        odeint(func, random(3), TIMES)


@pytest.mark.parametrize("grad", [False, True])
def test_an_error_inside_func_comes_out_as_itself(grad: bool) -> None:
    class OwnError(Exception):
        pass

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if float(t) > 0.5:
            raise OwnError("the reactor is dry")
        return -u

    with pytest.raises(OwnError, match="the reactor is dry"):
        odeint(func, random(2, 3).requires_grad_(grad), TIMES, step_size=0.1)


def test_a_module_can_be_used_again_after_its_func_raised() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.angry = Network(), False

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            if self.angry and float(t) > 0.5:
                raise KeyError("not today")
            result: torch.Tensor = self.network(t, u)
            return result

    moody, u0 = Moody(), random(2, 3)
    node = NeuralODE(moody, step_size=0.1)
    parameters = list(node.parameters())
    wanted = gradients(lambda u: node(u, TIMES), u0, parameters)
    moody.angry = True
    with pytest.raises(KeyError, match="not today"):
        node(u0, TIMES)
    moody.angry = False
    found = gradients(lambda u: node(u, TIMES), u0, parameters)
    assert distance(found, wanted) == 0


def test_an_error_in_the_backward_pass_is_raised_and_leaves_the_module_usable() -> None:
    class Sour(torch.autograd.Function):
        broken = False

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
            if Sour.broken:
                raise ArithmeticError("no way back")
            return cotangents[0]

    p, u0 = weight(), random(2, 3)
    node = NeuralODE(lambda t, u: Sour.apply(torch.tanh(u @ p)), step_size=0.1)  # type: ignore[no-untyped-call]
    wanted = gradients(lambda u: node(u, TIMES), u0, [p])
    Sour.broken = True
    with pytest.raises(ArithmeticError, match="no way back"):
        gradients(lambda u: node(u, TIMES), u0, [p])
    Sour.broken = False
    assert distance(gradients(lambda u: node(u, TIMES), u0, [p]), wanted) == 0


# Times


def test_a_func_that_writes_to_its_time_spoils_no_other_evaluation() -> None:
    def spoiling(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u * t.mul_(2.0)

    u0 = random(2, 3)
    found = [odeint(spoiling, u0, TIMES, step_size=0.2) for _ in range(2)]
    assert all(torch.equal(one, found[0]) for one in found)
    plain = odeint_plain(lambda t, u: u * 2.0 * t, u0, TIMES, TABLEAUX["4"], 0.2)
    assert distance(found[0], plain) <= 1e-14


def test_times_first_met_in_inference_mode_serve_gradients_later() -> None:
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    times = [0.0, 0.123456789]

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u * factor * t

    u0 = random(2, 3)
    with torch.inference_mode():
        odeint(func, u0, times, step_size=0.1)
    odeint(func, u0, times, step_size=0.1)[-1].sum().backward()
    expected = torch.autograd.grad(odeint_plain(func, u0, times, TABLEAUX["4"], 0.1)[-1].sum(), factor)[0]
    assert distance(factor.grad, expected) <= 1e-14
