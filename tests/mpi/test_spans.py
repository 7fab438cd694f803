"""Samples with times of their own, divided between ranks, against each sample alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnode_dist import BatchPartition, ConfigurationError, Mesh, odeint_spans
from tests.oracles.right_hand_sides import distance, random
from tests.unit.hybrid.test_spans import COUNTS, STEP, Clocked, one_by_one

pytestmark = pytest.mark.mpi


def times(samples: int) -> torch.Tensor:
    """Times of which the longest intervals, 0.9 and 0.7, are those of the first sample."""
    begin = torch.linspace(0.0, 1.0, samples, dtype=torch.float64)
    length = torch.linspace(1.0, 0.3, samples, dtype=torch.float64)
    return torch.stack([begin, begin + 0.9 * length, begin + 1.6 * length], 1)


@pytest.mark.parametrize("samples", [9, 1], ids=["nine samples", "ranks without a sample"])
def test_states_and_gradients_are_those_of_each_sample_alone(samples: int, mesh: Mesh) -> None:
    partition = BatchPartition(mesh, samples, (3,))
    begin, end = partition.owned
    f: nn.Module = Clocked()
    whole, every = random(samples, 3), times(samples)
    u0, t = whole[begin:end].clone().requires_grad_(), every[begin:end].clone().requires_grad_()
    assert COUNTS == [4, 3]
    found = odeint_spans(f, u0, t, step_size=STEP, partition=partition)
    alone, other = whole.clone().requires_grad_(), every.clone().requires_grad_()
    wanted = one_by_one(f, alone, other)
    assert distance(found.detach(), wanted.detach()[:, begin:end]) < 1e-12
    own = torch.autograd.grad(found.sin().sum(), [u0, t, *f.parameters()])
    expected = torch.autograd.grad(wanted.sin().sum(), [alone, other, *f.parameters()])
    assert distance(own[:2], [part[begin:end] for part in expected[:2]]) < 1e-12
    assert distance([mesh.sum(part) for part in own[2:]], expected[2:]) < 1e-12


def test_times_of_another_batch_on_one_rank_are_an_error_on_all(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 9, (3,))
    begin, end = partition.owned
    t = times(9)[begin : end + (mesh.rank == mesh.size - 1)]
    t = torch.cat([t, t[-1:]]) if mesh.rank == mesh.size - 1 else t
    with pytest.raises(ConfigurationError, match=r"must be \[batch, n\] with the same batch"):
        odeint_spans(Clocked(), random(9, 3)[begin:end], t, step_size=STEP, partition=partition)
