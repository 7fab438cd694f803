"""Solves under torch.func and in forward mode, against the same transforms of the plain steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pnode_dist import ConfigurationError, NeuralODE, SplitFunction, Trajectory, odeint
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.tiers import at_night

TIMES = [0.0, 0.4, 1.0]
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "snes_stol": 1e-15, "ksp_rtol": 1e-13}
Named = dict[str, torch.Tensor]
Solve = Callable[[Named, torch.Tensor], torch.Tensor]
Transform = Callable[[Solve, Named, torch.Tensor], Any]

NETWORK, U0 = Network(), random(3)
ALONG: Named = {name: random(*value.shape, seed=9) for name, value in NETWORK.named_parameters()}


def values() -> Named:
    return {name: value.detach().clone() for name, value in NETWORK.named_parameters()}


def plain(parameters: Named, u0: torch.Tensor, table: str = "4") -> torch.Tensor:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rate: torch.Tensor = functional_call(NETWORK, parameters, (t, u))
        return rate

    states: torch.Tensor = odeint_plain(func, u0, TIMES, TABLEAUX[table], 0.2)
    return states


def called(node: NeuralODE) -> Solve:
    def solve(parameters: Named, u0: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = functional_call(
            node, {f"func.{name}": value for name, value in parameters.items()}, (u0, TIMES)
        )
        return states

    return solve


def loss(solve: Solve) -> Callable[[Named, torch.Tensor], torch.Tensor]:
    return lambda parameters, u0: torch.sin(solve(parameters, u0)).sum()


def cubes(found: Named) -> torch.Tensor:
    total: torch.Tensor = torch.stack([value.pow(3).sum() for value in found.values()]).sum()
    return total


def dual(solve: Solve, p: Named, u: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        named = {name: forward_ad.make_dual(value, ALONG[name]) for name, value in p.items()}
        return forward_ad.unpack_dual(solve(named, forward_ad.make_dual(u, 2 * u)))


def gradient_of_dual(solve: Solve, p: Named, u: torch.Tensor) -> Any:
    p, u = {name: value.requires_grad_() for name, value in p.items()}, u.clone().requires_grad_()
    with forward_ad.dual_level():
        named = {name: forward_ad.make_dual(value, ALONG[name]) for name, value in p.items()}
        tangent = forward_ad.unpack_dual(torch.sin(solve(named, forward_ad.make_dual(u, 2 * u))).sum()).tangent
        return torch.autograd.grad(tangent, [u, *p.values()])


def seen_from_outside(solve: Solve, p: Named, u: torch.Tensor) -> Any:
    """An ordinary gradient of one that `torch.func` took."""
    p = {name: value.requires_grad_() for name, value in p.items()}
    inner = grad(loss(solve), argnums=1)(p, u)
    return torch.autograd.grad(inner.pow(3).sum(), list(p.values()))


def batch_seen_from_outside(solve: Solve, p: Named, u: torch.Tensor) -> Any:
    p = {name: value.requires_grad_() for name, value in p.items()}
    found = vmap(lambda x: solve(p, x))(random(4, 3))
    return torch.autograd.grad(torch.sin(found).sum(), list(p.values()))


TRANSFORMS: dict[str, Transform] = {
    "grad by state": lambda s, p, u: grad(loss(s), argnums=1)(p, u),
    "grad by parameters": lambda s, p, u: grad(loss(s))(p, u),
    "vjp": lambda s, p, u: vjp(s, p, u)[1](torch.ones(3, 3, dtype=torch.float64)),
    "jvp": lambda s, p, u: jvp(s, (p, u), (ALONG, 2 * u)),
    "jacrev": lambda s, p, u: jacrev(s, argnums=1)(p, u),
    "jacfwd": lambda s, p, u: jacfwd(s, argnums=1)(p, u),
    "hessian": lambda s, p, u: hessian(loss(s), argnums=1)(p, u),
    "hessian, reverse over reverse": lambda s, p, u: jacrev(jacrev(loss(s), argnums=1), argnums=1)(p, u),
    "grad of grad": lambda s, p, u: grad(lambda q: cubes(grad(loss(s))(q, u)))(p),
    "jvp of grad": lambda s, p, u: jvp(lambda q: grad(loss(s))(q, u), (p,), (ALONG,)),
    "grad of jvp": lambda s, p, u: grad(lambda q: jvp(lambda r: loss(s)(r, u), (q,), (ALONG,))[1])(p),
    "jvp of jvp": lambda s, p, u: jvp(lambda q: jvp(lambda r: s(r, u), (q,), (ALONG,))[1], (p,), (ALONG,)),
    "vmap over states": lambda s, p, u: vmap(s, (None, 0))(p, random(4, 3)),
    "vmap over columns": lambda s, p, u: vmap(s, (None, 1), 1)(p, random(3, 4)),
    "vmap over parameters": lambda s, p, u: vmap(s, (0, None))({k: torch.stack([v, 2 * v]) for k, v in p.items()}, u),
    "vmap of grad": lambda s, p, u: vmap(grad(loss(s)), (None, 0))(p, random(4, 3)),
    "vmap of vmap": lambda s, p, u: vmap(vmap(s, (None, 0)), (None, 0))(p, random(2, 3, 3)),
    "dual": dual,
    "gradient of a dual": gradient_of_dual,
    "grad inside backward": seen_from_outside,
    "vmap inside backward": batch_seen_from_outside,
}


def compared(transform: Transform, solve: Solve, table: str = "4") -> float:
    found = transform(solve, values(), U0.clone())
    wanted = transform(lambda p, u: plain(p, u, table), values(), U0.clone())
    leaves = torch.utils._pytree.tree_leaves
    return max(distance(a, b) for a, b in zip(leaves(found), leaves(wanted), strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_a_solve_is_that_of_the_plain_steps(name: str) -> None:
    assert compared(TRANSFORMS[name], called(NeuralODE(Network(), step_size=0.2))) <= 1e-13


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
@pytest.mark.parametrize(("method", "table"), [("euler", "1fe"), ("dopri5", "5dp")])
@pytest.mark.parametrize("name", ["grad by parameters", "jvp", "hessian", "jvp of grad", "gradient of a dual"])
def test_transforms_are_right_under_every_budget(name: str, method: str, table: str, keep: str) -> None:
    trajectory = Trajectory(ram="1MiB", keep=keep)
    node = NeuralODE(Network(), method=method, step_size=0.2, trajectory=trajectory)
    assert compared(TRANSFORMS[name], called(node), table) <= 1e-13


@pytest.mark.parametrize("method", at_night(["cn", "beuler", "arkimex_3", "dirk_s212", None], but=["arkimex_3", None]))
def test_the_hessian_by_forward_mode_is_that_of_two_backward_passes(method: str | None) -> None:
    network: nn.Module = Network()
    if method is not None and method.startswith("arkimex"):
        network = SplitFunction(implicit=Network(seed=1), explicit=Network(seed=2))
    if method is None:
        node = NeuralODE(network, rtol=1e-3, atol=1e-4)
    else:
        node = NeuralODE(network, method=method, step_size=0.2, options=TIGHT)

    def value(u: torch.Tensor) -> torch.Tensor:
        return torch.sin(node(u, TIMES)).sum()

    assert distance(hessian(value)(U0), torch.autograd.functional.hessian(value, U0)) <= 1e-9


def test_batched_products_of_autograd_are_those_of_one_at_a_time() -> None:
    node = NeuralODE(Network(), step_size=0.2)

    def value(u: torch.Tensor) -> torch.Tensor:
        return torch.sin(node(u, TIMES)).sum()

    functional = torch.autograd.functional
    for strategy in ("reverse-mode", "forward-mode"):
        found = functional.jacobian(lambda u: node(u, TIMES), U0, vectorize=True, strategy=strategy)
        assert distance(found, functional.jacobian(lambda u: node(u, TIMES), U0)) <= 1e-13
    for strategy in ("reverse-mode", "forward-mode"):
        found = functional.hessian(value, U0, vectorize=True, outer_jacobian_strategy=strategy)
        assert distance(found, functional.hessian(value, U0)) <= 1e-13


@pytest.mark.parametrize("place", ["closure", "args", "container", "attribute"])
def test_a_tensor_is_followed_wherever_f_holds_it(place: str) -> None:
    weight = random(3, 3, seed=5)

    class Holder:
        matrix: torch.Tensor

        def __call__(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.matrix @ u)

    def solved(matrix: torch.Tensor) -> torch.Tensor:
        if place == "closure":
            return odeint(lambda t, u: torch.tanh(matrix @ u), U0, TIMES, step_size=0.2).sum()
        if place == "args":
            return odeint(lambda t, u, m: torch.tanh(m @ u), U0, TIMES, step_size=0.2, args=(matrix,)).sum()
        if place == "container":
            held = {"all": [(matrix,)]}
            return odeint(lambda t, u: torch.tanh(held["all"][0][0] @ u), U0, TIMES, step_size=0.2).sum()
        holder = Holder()
        holder.matrix = matrix
        return odeint(holder, U0, TIMES, step_size=0.2).sum()

    def wanted(matrix: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = odeint_plain(lambda t, u: torch.tanh(matrix @ u), U0, TIMES, TABLEAUX["4"], 0.2)
        return states.sum()

    assert distance(grad(solved)(weight), grad(wanted)(weight)) <= 1e-13
    assert distance(hessian(solved)(weight), hessian(wanted)(weight)) <= 1e-13


def test_parameters_that_depend_on_one_another_are_followed_once() -> None:
    def value(solver: Callable[..., Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        def of(matrix: torch.Tensor) -> torch.Tensor:
            other = torch.sin(matrix)
            result: torch.Tensor = solver(lambda t, u: torch.tanh(matrix @ u + other @ u)).sum()
            return result

        return of

    found = value(lambda f: odeint(f, U0, TIMES, step_size=0.2))
    wanted = value(lambda f: odeint_plain(f, U0, TIMES, TABLEAUX["4"], 0.2))
    weight = random(3, 3, seed=5)
    assert distance(grad(found)(weight), grad(wanted)(weight)) <= 1e-13
    direction = random(3, 3, seed=6)
    assert distance(jvp(found, (weight,), (direction,))[1], jvp(wanted, (weight,), (direction,))[1]) <= 1e-13


def hidden(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A right-hand side that holds its weight where nobody can look."""
    source = iter(lambda: weight, None)
    return lambda t, u: torch.tanh(next(source) @ u)


@pytest.mark.parametrize("transform", ["grad", "jvp", "inner jvp", "outer grad", "vmap", "dual"])
def test_a_tensor_that_is_not_found_is_refused(transform: str) -> None:
    weight = random(3, 3, seed=5)

    def value(matrix: torch.Tensor) -> torch.Tensor:
        return odeint(hidden(matrix), U0, TIMES, step_size=0.2).sum()

    def of_state(matrix: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = grad(lambda u: odeint(hidden(matrix), u, TIMES, step_size=0.2).sum())(U0).sum()
        return found

    def scaled(factor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = jvp(value, (weight,), (weight,))[1] * factor
        return found

    def of_dual() -> None:
        with forward_ad.dual_level():
            value(forward_ad.make_dual(weight, weight))

    one = torch.ones((), dtype=torch.float64)
    attempts: dict[str, Callable[[], Any]] = {
        "grad": lambda: grad(value)(weight),
        "jvp": lambda: jvp(value, (weight,), (weight,)),
        "inner jvp": lambda: jvp(scaled, (one,), (one,)),
        "outer grad": lambda: grad(of_state)(weight),
        "vmap": lambda: vmap(value)(torch.stack([weight, weight])),
        "dual": of_dual,
    }
    with pytest.raises(ConfigurationError, match="was not found among its parameters"):
        attempts[transform]()
    with pytest.raises(ConfigurationError, match="by a name that is not found"):
        grad(lambda w: odeint(hidden(w), U0, TIMES, step_size=0.2, params=[w]).sum())(weight)


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_states_and_computations_are_followed(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> None:
    if dtype is torch.float64 and compute_dtype is None:
        compute_dtype = torch.float64
    network = Network(dtype=dtype)
    node = NeuralODE(network, step_size=0.2, compute_dtype=compute_dtype)
    p = {name: value.detach() for name, value in network.named_parameters()}
    along = {name: value.to(dtype) for name, value in ALONG.items()}
    u = U0.to(dtype)
    _, tangent = jvp(called(node), (p, u), (along, u))
    second = hessian(loss(called(node)), argnums=1)(p, u)
    _, wanted = jvp(plain, (values(), U0), (ALONG, U0))
    assert tangent.dtype is dtype
    assert second.dtype is dtype
    assert distance(tangent.double(), wanted) <= 1e-5
    assert distance(second.double(), hessian(loss(plain), argnums=1)(values(), U0)) <= 1e-5


def test_the_gradient_by_times_is_followed_and_their_tangents_are_refused() -> None:
    times = torch.tensor(TIMES, dtype=torch.float64)

    def value(t: torch.Tensor) -> torch.Tensor:
        return torch.sin(odeint(NETWORK, U0, t, step_size=0.2)).sum()

    followed = times.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(value(followed), followed)
    assert distance(grad(value)(times), wanted) <= 1e-14
    for attempt in (lambda: jvp(value, (times,), (times,)), lambda: hessian(value)(times)):
        with pytest.raises(ConfigurationError, match="times"):
            attempt()
    (slope,) = torch.autograd.grad(value(followed), followed, create_graph=True)
    with pytest.raises(ConfigurationError, match="times"):
        slope.sum().backward()


def test_tangents_of_jvp_are_followed() -> None:
    node, along = NeuralODE(Network(), step_size=0.2), {next(NETWORK.parameters()): random(5, 3, seed=3)}
    node.func = NETWORK

    def value(u: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.sin(node.jvp(u, TIMES, 2 * u, along)[1]).sum()
        return found

    start = U0.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(value(start), start)
    assert distance(grad(value)(U0), wanted) <= 1e-13


def test_statistics_are_those_of_the_solve_that_was_transformed() -> None:
    node = NeuralODE(Network(), step_size=0.2)
    grad(lambda u: node(u, TIMES).sum())(U0)
    assert node.last_solve.forward_steps == 5
    assert node.last_solve.adjoint_steps == 5
    assert node.last_plan is not None
    jvp(lambda u: node(u, TIMES), (U0,), (U0,))
    assert node.last_solve.forward_steps == 5
    with pytest.raises(ConfigurationError, match="plan"):
        grad(lambda u: node.plan(u, TIMES) and u.sum())(U0)


def test_a_method_without_an_adjoint_has_tangents() -> None:
    frozen = Network().requires_grad_(False)

    def value(u: torch.Tensor) -> torch.Tensor:
        return odeint(frozen, u, TIMES, method="ssp_rks3", step_size=0.2)

    _, tangent = jvp(value, (U0,), (U0,))
    step = 1e-6
    with torch.no_grad():
        wanted = (value(U0 + step * U0) - value(U0 - step * U0)) / (2 * step)
    assert distance(tangent, wanted) <= 1e-8
    with pytest.raises(ConfigurationError, match="ssp_rks3"):
        grad(lambda u: value(u).sum())(U0)


def test_attributes_that_changed_since_are_seen_as_they_were() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return -self.factor * u * u

    f = Scaled()

    def value(u: torch.Tensor) -> torch.Tensor:
        f.factor = 2.0
        found = odeint(f, u, [0.0, 1.0], step_size=0.1)[-1].sum()
        f.factor = 7.0
        return found

    start = torch.ones(1, dtype=torch.float64)
    wanted = torch.autograd.functional.hessian(
        lambda u: odeint_plain(lambda t, x: -2.0 * x * x, u, [0.0, 1.0], TABLEAUX["4"], 0.1)[-1].sum(), start
    )
    assert distance(torch.autograd.functional.hessian(value, start), wanted) <= 1e-12
    assert distance(hessian(value)(start), wanted) <= 1e-12


def test_random_numbers_are_drawn_again_for_second_derivatives() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -(1 + 0.5 * torch.rand_like(u)) * u * u

    def second(solve: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(3)
        start = torch.ones(2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(solve(start).sum(), start, create_graph=True)
        torch.manual_seed(4)
        return torch.autograd.grad(slope.pow(2).sum(), start)[0]

    found = second(lambda u: odeint(func, u, [0.0, 1.0], step_size=0.1)[-1])
    assert distance(found, second(lambda u: odeint_plain(func, u, [0.0, 1.0], TABLEAUX["4"], 0.1)[-1])) <= 1e-12


def test_random_numbers_in_a_batch_are_those_that_its_randomness_allows() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -(1 + 0.5 * torch.rand_like(u)) * u * u

    def value(u: torch.Tensor) -> torch.Tensor:
        return odeint(func, u, TIMES, step_size=0.2)

    batch = torch.ones(3, 2, dtype=torch.float64)
    torch.manual_seed(3)
    alone = value(batch[0])
    torch.manual_seed(3)
    assert distance(vmap(value, randomness="same")(batch), alone.expand(3, -1, -1)) <= 1e-14
    for randomness in ("error", "different"):
        with pytest.raises(ConfigurationError, match="draws random numbers"):
            vmap(value, randomness=randomness)(batch)


def counting() -> tuple[Callable[..., torch.Tensor], list[torch.Size]]:
    shapes: list[torch.Size] = []

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: torch.Tensor) -> torch.Tensor:
            shapes.append(u.shape)
            ctx.save_for_backward(u)
            return u * u

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor) -> torch.Tensor:
            return 2 * ctx.saved_tensors[0] * cotangents[0]

    return (lambda t, u: -Squared.apply(u)), shapes  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("last_only", [False, True])
def test_a_batch_of_states_is_one_solve(last_only: bool) -> None:
    node, batch = NeuralODE(NETWORK, step_size=0.2, last_only=last_only), random(4, 3)
    with torch.no_grad():
        alone = torch.stack([node(member, TIMES) for member in batch])
        evaluations = node.last_solve.function_evaluations
        together = vmap(lambda u: node(u, TIMES))(batch)
    assert distance(together, alone) <= 1e-14
    assert node.last_solve.function_evaluations == evaluations
    other = vmap(lambda u: node(u, TIMES), 1, 1)(batch.T)
    assert distance(other, alone.movedim(0, 1)) <= 1e-14


def test_a_batch_of_pairs_of_which_one_is_the_same_for_all_is_one_solve() -> None:
    def pair(t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return NETWORK(t, u[0]) + u[1], torch.sin(u[0]) * u[1]

    def solve(u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return odeint(pair, (u, U0), TIMES, step_size=0.2)

    batch = random(4, 3)
    wanted = [torch.stack(parts) for parts in zip(*map(solve, batch), strict=True)]
    assert distance(vmap(solve)(batch), wanted) <= 1e-14


def test_a_batch_of_an_f_without_a_form_for_batches_is_solved_one_after_the_other() -> None:
    func, shapes = counting()

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(func, u, TIMES, step_size=0.2)

    batch = torch.rand(4, 3, dtype=torch.float64)
    assert distance(vmap(solve)(batch), torch.stack([solve(u) for u in batch])) <= 1e-14
    assert set(shapes) == {torch.Size([3])}


@pytest.mark.parametrize("batched", [False, True])
def test_a_pullback_may_be_called_again_and_without_a_graph(batched: bool) -> None:
    node = NeuralODE(NETWORK, step_size=0.2)
    state = torch.stack([U0, 2 * U0]) if batched else U0

    def pullback(solve: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Any]:
        found: Callable[[torch.Tensor], Any] = vjp(vmap(solve) if batched else solve, state)[1]
        return found

    wanted = pullback(lambda u: plain(values(), u))
    cotangent = torch.ones_like(vmap(lambda u: plain(values(), u))(state) if batched else plain(values(), state))
    with torch.no_grad():
        found = pullback(lambda u: node(u, TIMES))
        for _ in range(2):
            assert distance(found(cotangent), wanted(cotangent)) <= 1e-13


@pytest.mark.parametrize("tracer", ["linearize", "functionalize", "make_fx", "jit.trace"])
def test_a_tracer_is_refused_with_what_to_use_instead(tracer: str) -> None:
    frozen = Network().requires_grad_(False)

    def solve(u: torch.Tensor) -> torch.Tensor:
        return odeint(frozen, u, TIMES, step_size=0.2)

    attempts: dict[str, Callable[[], Any]] = {
        "linearize": lambda: torch.func.linearize(solve, U0),
        "functionalize": lambda: torch.func.functionalize(solve)(U0),
        "make_fx": lambda: make_fx(solve)(U0),
        "jit.trace": lambda: torch.jit.trace(solve, U0, check_trace=False),
    }
    with pytest.raises(ConfigurationError, match=rf"{tracer}.*cannot be recorded"):
        attempts[tracer]()


def test_a_batch_norm_in_f_is_followed_and_advances_once() -> None:
    func = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    batch = random(4, 3)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = func

        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            rate: torch.Tensor = self.layers(u)
            return rate

    flow = Flow()
    node, kept = NeuralODE(flow, step_size=0.2), {k: v.clone() for k, v in flow.state_dict().items()}

    def after(value: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        flow.load_state_dict(kept)
        start = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.sin(value(start)).sum(), start, create_graph=True)
        (second,) = torch.autograd.grad((slope**3).sum(), start)
        return second, *(buffer.double() for buffer in flow.buffers())

    found = tuple(part.clone() for part in after(lambda u: node(u, TIMES)))
    assert distance(found, after(lambda u: odeint_plain(flow, u, TIMES, TABLEAUX["4"], 0.2))) <= 1e-12
