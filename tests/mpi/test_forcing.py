"""A forcing of a partitioned state: each rank interpolates its own part."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from pnode_dist import DensePartition, Forcing, Mesh, odeint
from pnode_dist.exchange import global_sum
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("kind", ["previous", "linear", "cubic"])
def test_states_and_gradients_are_those_of_the_whole_state(kind: str, mesh: Mesh) -> None:
    partition, times = DensePartition(mesh, 7), [0.0, 0.3, 0.7, 1.0]
    begin, end = partition.owned
    values, whole = random(4, 7), random(7, seed=2)
    own, every = (
        Forcing(times, nn.Parameter(part), kind=kind) for part in (values[:, begin:end].clone(), values.clone())
    )
    u0 = whole[begin:end].clone()
    found = odeint(
        lambda t, u: own(t) - u * global_sum(u.sum(), partition.comm),
        u0,
        [0.0, 1.0],
        step_size=0.1,
        jumps=own.jumps,
        partition=partition,
    )[-1]
    state = whole
    for number, (first, last) in enumerate(pairwise(times)):
        # With steps of a constant value, the plain solver must not meet the next one.
        held = every.values[number] if kind == "previous" else None
        state = odeint_plain(
            lambda t, u, held=held: (every(t) if held is None else held) - u * u.sum(),
            state,
            [first, last] if kind != "cubic" else [0.0, 1.0],
            TABLEAUX["4"],
            0.1,
        )[-1]
        if kind == "cubic":
            break
    assert distance(found.detach(), state.detach()[begin:end]) < 1e-12
    (gradient,) = torch.autograd.grad(found.square().sum(), own.values)
    (expected,) = torch.autograd.grad(state.square().sum(), every.values)
    assert distance(gradient, expected[:, begin:end]) < 1e-12
