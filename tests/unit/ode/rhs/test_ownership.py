"""Memory that f returns is used as it is only where nobody else can write into it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.ode.rhs import ownership
from pnode_dist.ode.rhs.ownership import owned
from tests.oracles.right_hand_sides import distance
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

MATRIX = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64).view(3, 3)
START = torch.tensor([[0.3, -0.7, 1.1], [0.2, 0.9, -0.4]], dtype=torch.float64)
TIMES = [0.0, 0.5, 1.0]
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fresh(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.tanh(u @ MATRIX) * (1 + t)


def through(buffers: int, view: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    """f whose values lie in so many buffers, which it fills in turn, and which it returns by `view`."""
    turns = cycle([torch.empty_like(START) for _ in range(buffers)])

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        buffer = next(turns)
        return view(buffer.copy_(fresh(t, u)))

    return f


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda buffer: buffer,
    "slice": lambda buffer: buffer[:],
    "detached": lambda buffer: buffer.detach(),
    "data": lambda buffer: buffer.data,
    "numpy": lambda buffer: torch.from_numpy(buffer.numpy()),
    "dlpack": lambda buffer: torch.from_dlpack(buffer),
    "transposed": lambda buffer: buffer.T.T,
    "storage": lambda buffer: torch.empty(0, dtype=buffer.dtype).set_(buffer.untyped_storage()).view(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("buffers", [1, 2, 3, 4, 5])
def test_f_may_alternate_between_any_number_of_buffers(buffers: int, view: str) -> None:
    f = through(buffers, VIEWS[view])
    with torch.no_grad():
        found = odeint(f, START, TIMES, method="rk4", step_size=0.25)
    assert distance(found, odeint_plain(fresh, START, TIMES, TABLEAUX["4"], 0.25)) <= 1e-14


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_f_may_alternate_between_buffers_with_error_control(method: str) -> None:
    with torch.no_grad():
        found, wanted = (
            odeint(f, START, TIMES, method=method, rtol=1e-5, atol=1e-7) for f in (through(2, VIEWS["itself"]), fresh)
        )
    assert torch.equal(found, wanted)


def test_two_buffers_that_were_35_per_mille_off_in_rk4_are_right() -> None:
    buffers = cycle([torch.empty(1, dtype=torch.float64) for _ in range(2)])

    def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.neg(u, out=next(buffers))

    with torch.no_grad():
        found = odeint(decay, torch.ones(1, dtype=torch.float64), [0.0, 1.0], method="rk4", step_size=0.5)[-1]
    ratio = 1 - 0.5 + 0.5**2 / 2 - 0.5**3 / 6 + 0.5**4 / 24
    assert abs(found.item() - ratio**2) <= 1e-15


class _IntoBuffer(torch.autograd.Function):
    """tanh(u A) (1 + t) in a buffer that is the same at every evaluation, with its derivative."""

    buffer = torch.empty_like(START)

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(t, u)
        return _IntoBuffer.buffer.copy_(fresh(t, u)).detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        t, u = ctx.saved_tensors
        return None, (cotangents[0] * (1 - torch.tanh(u @ MATRIX) ** 2) * (1 + t)) @ MATRIX.T


@pytest.mark.parametrize("keep", ["solution", "stages", "graph", "auto"])
def test_an_operation_may_fill_one_buffer_while_its_graph_is_kept(keep: str) -> None:
    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return _IntoBuffer.apply(t, u)  # type: ignore[no-untyped-call, no-any-return]

    start = START.clone().requires_grad_()
    end = odeint(f, start, TIMES, step_size=0.25, trajectory=Trajectory(ram="1MiB", keep=keep))[-1]
    (found,) = torch.autograd.grad(end.square().sum(), start)
    plain = START.clone().requires_grad_()
    wanted_end = odeint_plain(fresh, plain, TIMES, TABLEAUX["4"], 0.25)[-1]
    (wanted,) = torch.autograd.grad(wanted_end.square().sum(), plain)
    assert distance(end.detach(), wanted_end.detach()) <= 1e-14
    assert distance(found, wanted) <= 1e-13


def test_the_parts_of_a_state_may_share_a_buffer_and_the_tuple_too() -> None:
    both = torch.empty(2, 3, dtype=torch.float64)
    held = (both[0], both[1])

    def f(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        both.copy_(torch.stack([u[1], -u[0]]))
        return held

    start = (torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    with torch.no_grad():
        found = odeint(f, start, TIMES, step_size=0.25)
        wanted = odeint(lambda t, u: (u[1].clone(), -u[0]), start, TIMES, step_size=0.25)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_tensors_that_only_the_tuple_of_f_holds_are_copied() -> None:
    held = (torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64))

    def f(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        held[0].copy_(u[1])
        torch.neg(u[0], out=held[1])
        return held

    start = (torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    with torch.no_grad():
        found = odeint(f, start, TIMES, step_size=0.25)
        wanted = odeint(lambda t, u: (u[1].clone(), -u[0]), start, TIMES, step_size=0.25)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_f_may_return_an_expanded_buffer() -> None:
    rate = torch.empty(1, 3, dtype=torch.float64)

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return rate.copy_(-u[:1]).expand(2, 3)

    start = START[:1].expand(2, 3)
    with torch.no_grad():
        found = odeint(f, start, TIMES, step_size=0.25)
    assert (
        distance(found, odeint_plain(lambda t, u: -u, START[:1], TIMES, TABLEAUX["4"], 0.25).expand(3, 2, 3)) <= 1e-14
    )


def test_f_may_return_its_state_or_part_of_it() -> None:
    with torch.no_grad():
        found = odeint(lambda t, u: u, START, TIMES, step_size=0.25)
        flipped = odeint(lambda t, u: u.view(3, 2).view(2, 3), START, TIMES, step_size=0.25)
    wanted = odeint_plain(lambda t, u: u.clone(), START, TIMES, TABLEAUX["4"], 0.25)
    assert distance(found, wanted) <= 1e-14
    assert distance(flipped, wanted) <= 1e-14


MADE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "product": lambda u: u @ MATRIX,
    "tanh": lambda u: torch.tanh(u @ MATRIX),
    "view of tanh": lambda u: torch.tanh(u @ MATRIX).view(3, 2),
    "softmax": lambda u: torch.softmax(u @ MATRIX, 0),
    "slice": lambda u: (u @ MATRIX)[:, :2],
    "expanded": lambda u: u.sum().expand(2, 3),
    "linear": lambda u: torch.nn.functional.linear(u[None], MATRIX),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_a_value_that_nobody_else_holds_is_not_copied(name: str, gradients: bool) -> None:
    start = START.clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        values = (MADE[name](start),)
        kept = owned(values)
    assert kept[0] is values[0]


def test_every_value_is_copied_where_torch_does_not_count_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "storage_references", None)
    values = (fresh(torch.tensor(0.0), START),)
    kept = owned(values)
    assert kept[0] is not values[0]
    torch.testing.assert_close(kept[0], values[0], rtol=0, atol=0)


class _Copies(TorchDispatchMode):
    """Counts the copies that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [None, "solution", "stages", "graph"])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_a_solve_copies_no_value_that_nobody_else_holds(method: str, keep: str | None) -> None:
    def copies(f: Function) -> int:
        start = START.clone().requires_grad_(keep is not None)
        trajectory = None if keep is None else Trajectory(ram="1MiB", keep=keep)
        with _Copies() as seen:
            end = odeint(f, start, [0.0, 1.0], method=method, step_size=0.125, trajectory=trajectory)[-1]
            if keep is not None:
                torch.autograd.grad(end.sum(), start)
        return seen.count

    def held(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        kept.append(fresh(t, u))
        return kept[-1]

    kept: list[torch.Tensor] = []
    assert copies(held) >= len(kept) - 2 > 0
    assert copies(fresh) <= 2


def test_a_state_that_f_writes_into_later_is_refused() -> None:
    def writes(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if t > 0:
            u.mul_(2)
        return -u

    start = START.clone().requires_grad_()
    node = NeuralODE(writes, step_size=0.25, trajectory=Trajectory(ram="1MiB", keep="stages"))
    for state in (START, start):
        with pytest.raises(RuntimeError, match="func changed its state u by an in-place operation"):
            node(state, [0.0, 0.25])


def test_an_array_of_numpy_that_f_fills_again_is_copied() -> None:
    array = np.empty((2, 3))

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        np.negative(u.numpy(), out=array)
        return torch.as_tensor(array)

    with torch.no_grad():
        found = odeint(f, START, TIMES, step_size=0.25)
    assert distance(found, odeint_plain(lambda t, u: -u, START, TIMES, TABLEAUX["4"], 0.25)) <= 1e-14
