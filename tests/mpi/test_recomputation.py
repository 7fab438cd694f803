"""Every gradient of an impure f is that of plain autograd through the steps, or an error: on every rank alike."""

from __future__ import annotations

import os
import random as python_random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from pnode_dist import BatchPartition, NeuralODE, RecomputationError, Trajectory
from tests.oracles.impure import BETWEEN, PRECISIONS, SIZE, TRAITS, Impure, autocast, plain_steps, restore_globals
from tests.oracles.right_hand_sides import distance

pytestmark = pytest.mark.mpi
EXAMPLES = int(os.environ.get("PNODE_DIST_EXAMPLES", "50"))
METHODS = {"euler": "1fe", "midpoint": "2b", "rk4": "4", "dopri5": "5dp"}
BUDGETS: dict[str, dict[str, Any]] = {
    "solution": {"ram": "1MiB", "keep": "solution"},
    "stages": {"ram": "1MiB", "keep": "stages"},
    "graph": {"ram": "4MiB", "keep": "graph"},
    "auto": {"ram": "20KiB"},
    "revolve": {"ram_slots": 2, "schedule": "revolve"},
    "revolve of stages": {"ram_slots": 2, "keep": "stages", "schedule": "revolve"},
    "multistage": {"ram_slots": 1, "disk": "1MiB", "disk_slots": 2, "schedule": "multistage"},
    "h-revolve": {"ram_slots": 1, "disk": "1MiB", "disk_slots": 1, "schedule": "h-revolve"},
    "one slot": {"ram": 100, "keep": "auto"},
}
UNHELD = {"numpy draws", "python draws", "late draws", "array"}
"""Traits that depend on what no capture holds."""

Gradients = list[torch.Tensor]


def seed() -> None:
    torch.manual_seed(11)
    python_random.seed(11)


def state_of(traits: tuple[str, ...]) -> tuple[Impure, torch.Tensor]:
    func = Impure(traits)
    start = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    return func, start


def wanted(traits: tuple[str, ...], precision: str, method: str, steps: int) -> tuple[Gradients, Gradients]:
    """The gradients of a plain loop, and the buffers after it."""
    func, start = state_of(traits)
    seed()
    with autocast(precision in ("autocast round the forward pass", "autocast round both")):
        end = plain_steps(func, start, steps, METHODS[method])
    buffers = [buffer.clone() for buffer in func.buffers()]
    parameters = [p for p in func.parameters() if p.requires_grad]
    return list(torch.autograd.grad(end.square().sum(), [start, *parameters])), buffers


def found(
    traits: tuple[str, ...], between: tuple[str, ...], precision: str, method: str, steps: int, budget: str
) -> tuple[Gradients, Gradients, bool]:
    """The same of a solve under a budget, and whether its backward pass has left everything else as it was."""
    func, start = state_of(traits)
    parameters = [p for p in func.parameters() if p.requires_grad]
    partition = BatchPartition(MPI.COMM_WORLD, 4 * MPI.COMM_WORLD.size, (SIZE,))
    solve = NeuralODE(
        func,
        method=method,
        step_size=1.0 / steps,
        partition=partition,
        trajectory=Trajectory(**BUDGETS[budget]),
        last_only=True,
    )
    seed()
    with autocast(precision in ("autocast round the forward pass", "autocast round both")):
        end = solve(start, [0.0, 1.0])
        loss = end.square().sum()
    buffers = [buffer.clone() for buffer in func.buffers()]
    for change in between:
        BETWEEN[change](func)
    before = (
        torch.get_rng_state(),
        func.training,
        func.scale,
        func.calls,
        [buffer.clone() for buffer in func.buffers()],
    )
    with autocast(precision in ("autocast round the backward pass", "autocast round both")):
        gradients = list(torch.autograd.grad(loss, [start, *parameters]))
    after = (torch.get_rng_state(), func.training, func.scale, func.calls, list(func.buffers()))
    untouched = (
        torch.equal(before[0], after[0])
        and before[1:4] == after[1:4]
        and all(torch.equal(b, a) for b, a in zip(before[4], after[4], strict=True))
    )
    return gradients, buffers, untouched


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    traits=st.lists(st.sampled_from(TRAITS), max_size=3, unique=True).map(tuple),
    between=st.lists(st.sampled_from(list(BETWEEN)), max_size=3, unique=True).map(tuple),
    precision=st.sampled_from(PRECISIONS),
    method=st.sampled_from(list(METHODS)),
    steps=st.integers(1, 9),
    budget=st.sampled_from(list(BUDGETS)),
)
@pytest.mark.timeout(1200)
def test_the_gradient_is_that_of_plain_autograd_or_an_error(
    traits: tuple[str, ...], between: tuple[str, ...], precision: str, method: str, steps: int, budget: str
) -> None:
    fault = ""
    try:
        expected, expected_buffers = wanted(traits, precision, method, steps)
        gradients, buffers, untouched = found(traits, between, precision, method, steps, budget)
        # Some are zero but for rounding: that of a bias ahead of a batch norm.
        error = distance(*(torch.cat([g.reshape(-1) for g in every]) for every in (gradients, expected)))
        if error > 1e-12:
            fault = f"gradients are wrong by {error:.3g}"
        elif not all(torch.allclose(b, e, rtol=1e-12, atol=0) for b, e in zip(buffers, expected_buffers, strict=True)):
            fault = "buffers are not where a plain loop leaves them"
        elif not untouched:
            fault = "the backward pass left a trace"
    except RecomputationError:
        # What nothing holds may be refused; all else is right.
        if not UNHELD & set(traits) and "class attribute" not in between:
            fault = "refused"
    except RuntimeError as error:
        # Autograd's own refusal, as of a plain loop.
        if "modified by an inplace operation" not in str(error) or not any("in place" in name for name in between):
            fault = repr(error)
    finally:
        restore_globals()
    faults = MPI.COMM_WORLD.allgather(fault)
    assert not any(faults), faults
