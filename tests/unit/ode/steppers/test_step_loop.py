"""A traced step as several steps, against a loop in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pnode_dist.ode.steppers.step_loop import Backend, looping, repeating
from pnode_dist.system.torch_internals import backend_of
from tests import torch_releases
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.slow  # torch.compile alone takes seconds to load
Parts = tuple[torch.Tensor, ...]


@pytest.mark.parametrize("transform", [pytest.param(looping, marks=torch_releases.with_scan), repeating])
def test_a_traced_step_becomes_one_step_for_each_time(transform: Callable[[Backend], Backend]) -> None:
    matrix = random(3, 3, seed=3).requires_grad_()

    def after(first: torch.Tensor, second: torch.Tensor, start: torch.Tensor, size: torch.Tensor) -> Parts:
        return first + size * torch.sin(second @ matrix.T), second - size * first * (start + 1)

    # torch.compile reads the names of the arguments.
    def step(state: Parts, turns: Parts) -> Parts:
        starts, sizes = turns
        first, second = after(*state, starts[0], sizes[0])
        return first, second, first.detach() * second.detach()

    compiled = torch.compile(step, backend=transform(backend_of("aot_eager", {}, {})), fullgraph=True, dynamic=False)
    state = (random(2, 3), random(2, 3, seed=2))
    starts, sizes = random(4, seed=4), random(4, seed=5)
    wanted, products = state, []
    for start, size in zip(starts, sizes, strict=True):
        wanted = after(*wanted, start, size)
        products.append((wanted[0] * wanted[1]).detach())
    *states, stacked = compiled(state, (starts, sizes))
    found = tuple(states)
    assert distance(stacked, torch.stack(products)) <= 1e-14
    assert distance(found, wanted) <= 1e-14
    gradients = [torch.autograd.grad((one.sin() * two).sum(), matrix)[0] for one, two in (found, wanted)]
    assert distance(*gradients) <= 1e-14
