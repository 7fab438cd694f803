"""Initial states: tuples, types, shapes, memory."""

from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, odeint
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.4, 1.0]


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -u


class Coupled(torch.nn.Module):
    """A matrix and a vector that drive each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(random(3, 3, seed=11))
        self.b = torch.nn.Parameter(random(2, seed=12))

    def forward(self, t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        matrix, vector = u
        return torch.tanh(matrix @ self.a) * vector.sum(), torch.sin(t + self.b * vector) + matrix.mean()


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", ["rk4", "bosh3", "8vr"])
def test_a_tuple_of_tensors_gives_the_gradients_of_plain_torch(method: str, times: list[float]) -> None:
    module = Coupled()
    start = (random(4, 3, seed=1).requires_grad_(), random(2, seed=2).requires_grad_())
    table = {"rk4": "4", "bosh3": "3bs", "8vr": "8vr"}[method]

    def results(solution: Any) -> tuple[torch.Tensor, ...]:
        assert isinstance(solution, tuple)
        loss = torch.sin(solution[0]).sum() + (solution[1][1:] ** 2).sum()
        return *solution, *torch.autograd.grad(loss, [*start, *module.parameters()])

    found = results(odeint(module, start, times, method=method, step_size=0.3))
    wanted = results(odeint_plain(module, start, times, TABLEAUX[table], 0.3))
    assert found[0].shape == (3, 4, 3)
    assert found[1].shape == (3, 2)
    assert distance(found, wanted) <= 1e-12


def test_a_loss_may_use_one_part_of_a_tuple_only() -> None:
    module, start = Coupled(), (random(4, 3, seed=1), random(2, seed=2).requires_grad_())
    targets = [start[1], *module.parameters()]
    found = torch.autograd.grad(odeint(module, start, TIMES)[1].sum(), targets)
    wanted = torch.autograd.grad(odeint_plain(module, start, TIMES, TABLEAUX["4"])[1].sum(), targets)
    assert distance(found, wanted) <= 1e-12
    assert start[0].grad is None


def test_a_tuple_of_one_stays_a_tuple() -> None:
    solution = odeint(lambda t, u: (-u[0],), (torch.ones(2, dtype=torch.float64),), TIMES)
    assert isinstance(solution, tuple)
    assert solution[0].shape == (3, 2)


def test_float32_computes_in_float32_and_answers_in_it() -> None:
    seen: set[torch.dtype] = set()
    network = Network(dtype=torch.float32)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.update((t.dtype, u.dtype))
        return network(t, u)

    parameters, u0 = list(network.parameters()), random(2, 3, dtype=torch.float32)
    found = gradients(lambda u: odeint(func, u, TIMES, step_size=0.2), u0, parameters)
    assert seen == {torch.float32}
    assert all(value.dtype == torch.float32 for value in found)
    exact = Network()
    wanted = gradients(
        lambda u: odeint_plain(exact, u, TIMES, TABLEAUX["4"], 0.2), u0.double(), list(exact.parameters())
    )
    assert distance([f.double() for f in found], wanted) < 5e-6


def test_small_steps_of_a_float32_state_are_kept_in_float64_on_request() -> None:
    def end(state_dtype: torch.dtype | None) -> float:
        found = odeint(
            lambda t, u: torch.full_like(u, 1e-5),
            torch.ones(1),
            [0.0, 1.0],
            method="euler",
            step_size=1e-3,
            state_dtype=state_dtype,
        )
        return float(found[-1])

    assert end(torch.float64) == pytest.approx(1 + 1e-5, abs=6e-8)
    # In float32 a thousand additions of 1e-3 * 1e-5 to 1 are lost, as in plain torch.
    assert end(torch.float32) == end(None) == 1.0


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (2, 3, 4), (1, 1, 1, 1)])
def test_any_shape_of_state_is_solved(shape: tuple[int, ...]) -> None:
    rate = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    u0 = random(*shape) if shape else torch.tensor(1.5, dtype=torch.float64)
    found = gradients(lambda u: odeint(lambda t, v: rate * v, u, TIMES), u0, [rate])
    wanted = gradients(lambda u: odeint_plain(lambda t, v: rate * v, u, TIMES, TABLEAUX["4"]), u0, [rate])
    assert distance(found, wanted) <= 1e-12


@pytest.mark.parametrize(
    "u0",
    [random(3, 2).T, random(4, 6)[::2, ::2], random(1, 3).expand(2, 3), random(2, 3)[:, [2, 0, 1]].t().t()],
    ids=["transposed", "strided", "expanded", "indexed"],
)
def test_the_layout_of_u0_in_memory_does_not_matter(u0: torch.Tensor) -> None:
    network = Network()
    parameters = list(network.parameters())
    solution = odeint(network, u0, TIMES)
    found = [solution, *torch.autograd.grad(torch.sin(solution).sum(), parameters)]
    solution = odeint(network, u0.contiguous(), TIMES)
    wanted = [solution, *torch.autograd.grad(torch.sin(solution).sum(), parameters)]
    assert distance(found, wanted) == 0


def test_u0_may_be_an_intermediate_result() -> None:
    network, leaf = Network(), random(2, 3).requires_grad_()
    (found,) = torch.autograd.grad(odeint(network, torch.exp(leaf), TIMES).sum(), [leaf])
    (wanted,) = torch.autograd.grad(odeint_plain(network, torch.exp(leaf), TIMES, TABLEAUX["4"]).sum(), [leaf])
    assert distance(found, wanted) <= 1e-12


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_u0_keeps_its_values(requires_grad: bool, method: str) -> None:
    u0 = random(2, 3).requires_grad_(requires_grad)
    before = u0.detach().clone()
    odeint(Network(), u0, TIMES, method=method)[-1].sum().backward()
    assert torch.equal(u0.detach(), before)


def test_refilling_u0_after_the_call_leaves_the_solution_alone() -> None:
    network, u0 = Network(), random(2, 3)
    solution = odeint(network, u0, TIMES)
    before = solution.detach().clone()
    u0.zero_()
    assert torch.equal(solution.detach(), before)


@pytest.mark.parametrize("backward_time", [False, True])
def test_refilling_u0_before_the_backward_pass_is_right_or_refused(backward_time: bool) -> None:
    network, u0 = Network(), random(2, 3)
    times = TIMES[::-1] if backward_time else TIMES
    parameters = list(network.parameters())
    wanted = torch.autograd.grad(odeint(network, u0.clone(), times).sum(), parameters)
    solution = odeint(network, u0, times)
    u0.zero_()
    try:
        found = torch.autograd.grad(solution.sum(), parameters)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert distance(found, wanted) == 0


def test_a_parameter_changed_before_the_backward_pass_is_refused() -> None:
    network, u0 = Network(), random(2, 3)
    solution = odeint(network, u0, TIMES)
    with torch.no_grad():
        network.inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.sum().backward()


def test_writing_into_the_solution_does_not_reach_the_gradient() -> None:
    network, u0 = Network(), random(2, 3).requires_grad_()
    (wanted,) = torch.autograd.grad(odeint(network, u0, TIMES).sum(), [u0])
    solution = odeint(network, u0, TIMES)
    loss = solution.sum()
    with torch.no_grad():
        solution.zero_()
    (found,) = torch.autograd.grad(loss, [u0])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "3"])
def test_a_func_that_writes_into_u_is_right_or_refused(method: str) -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        u.mul_(-1.0)
        return u

    u0 = random(2, 3)
    wanted = odeint(decay, u0, TIMES, method=method, step_size=0.2)
    try:
        with torch.no_grad():
            found = odeint(func, u0, TIMES, method=method, step_size=0.2)
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error)  # noqa: PT017
    else:
        assert distance(found, wanted) <= 1e-14


def test_a_func_that_returns_u_itself_gives_the_exponential() -> None:
    u0 = random(2, 3)
    found = gradients(lambda u: odeint(lambda t, v: v, u, TIMES), u0, [])
    wanted = gradients(lambda u: odeint_plain(lambda t, v: v, u, TIMES, TABLEAUX["4"]), u0, [])
    assert distance(found, wanted) <= 1e-13


@pytest.mark.parametrize(
    ("u0", "complaint"),
    [
        (torch.ones(2, dtype=torch.int64), "floating-point"),
        ((torch.ones(2), torch.ones(2, dtype=torch.complex128)), "one floating-point type"),
        ((torch.ones(2), torch.ones(2, dtype=torch.float64)), "one floating-point type"),
        ((), "tensor"),
        ([1.0, 2.0], "tensor or a tuple of tensors"),
        ((torch.ones(2), 1.0), "tensor or a tuple of tensors"),
        (torch.ones(2, device="meta"), "keeps values"),
    ],
)
def test_a_state_that_cannot_be_solved_is_refused(u0: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match="u0 must") as caught:
        odeint(decay, u0, TIMES)
    assert complaint in str(caught.value)


def test_one_module_solves_states_of_changing_shape_and_type() -> None:
    node = NeuralODE(decay, method="8vr")
    for u0 in (random(2, 3), random(5), random(2, 3, dtype=torch.float32), random(2, 3)):
        found = node(u0, [0.0, 1.0])
        assert found.dtype == u0.dtype
        torch.testing.assert_close(found[-1], u0 * 0.36787944117144233, rtol=1e-6, atol=0)
