"""Mirrored fields and fixed values beyond the edges, on their own and beside every other rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import halo
from pnode_dist.nn import Conv2d
from tests.mpi.grids import block, blocks
from tests.oracles.fields import convolved, padded
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

SHAPE = (11, 13)
RULES: tuple[str | float, ...] = ("periodic", "replicate", "zero", "reflect", 1.5, -2.0)
PAIRS = [pair for pair in product(RULES, RULES) if "reflect" in pair or any(isinstance(rule, float) for rule in pair)]


def test_the_oracle_mirrors_as_torch_does() -> None:
    whole = random(2, *SHAPE, 3)
    wanted = functional.pad(whole.permute(0, 3, 1, 2), (2, 2, 3, 3), mode="reflect").permute(0, 2, 3, 1)
    assert torch.equal(padded(whole, ("reflect", "reflect"), (3, 2)), wanted)


@pytest.mark.parametrize("boundary", PAIRS, ids=str)
def test_a_halo_and_its_gradient_are_those_of_the_padded_whole_field(
    boundary: tuple[str | float, str | float], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=3)
    whole = random(2, *SHAPE, 2).requires_grad_()
    for width in ((1, 1), (3, 2), (0, 3)):
        wanted = padded(whole, boundary, width)
        local = block(partition, whole.detach()).clone().requires_grad_()
        found = halo(local, partition, width)
        assert torch.equal(found, block(partition, wanted, width))
        # The whole loss: every rank's weighted sum of its padded block.
        weights = [random(*block.shape, seed=rank) for rank, block in enumerate(blocks(partition, wanted, width))]
        loss = sum((w * b).sum() for w, b in zip(weights, blocks(partition, wanted, width), strict=True))
        (gradient_wanted,) = torch.autograd.grad(loss, [whole])
        (gradient,) = torch.autograd.grad((weights[partition.comm.rank] * found).sum(), [local])
        assert distance(gradient, block(partition, gradient_wanted)) <= 1e-14


@pytest.mark.parametrize("boundary", [("reflect", "periodic"), (1.5, "reflect")], ids=str)
def test_tangents_are_those_of_the_padded_whole_field(boundary: tuple[str | float, str | float], mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=2)
    whole, tangent = random(*SHAPE, 2), random(*SHAPE, 2, seed=3)
    _, wanted = torch.func.jvp(lambda u: padded(u, boundary, (2, 2)), (whole,), (tangent,))
    _, found = torch.func.jvp(lambda u: halo(u, partition), (block(partition, whole),), (block(partition, tangent),))
    assert torch.equal(found, block(partition, wanted, (2, 2)))


@pytest.mark.parametrize("boundary", [("reflect", "reflect"), (0.5, "periodic"), ("zero", 2.0)], ids=str)
def test_a_convolution_is_torch_s_of_the_padded_whole_field(
    boundary: tuple[str | float, str | float], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=2)
    torch.manual_seed(3)
    conv = Conv2d(partition, 2, 4, 3, dilation=2, dtype=torch.float64)
    whole = random(3, *SHAPE, 2)
    wanted = convolved(whole, boundary, conv.weight, conv.bias, conv.dilation)
    assert distance(conv(block(partition, whole)), block(partition, wanted)) <= 1e-13


def test_a_mirror_needs_one_point_more_than_the_halo_is_wide(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (3, 3 * mesh.size), boundary=("reflect", "zero"), processes=(1, mesh.size))
    assert halo(torch.ones(partition.local_shape), partition, (2, 3)).shape == (7, 9, 1)
    with pytest.raises(ConfigurationError, match=r"width = \(3, 1\): must be between 0 and what .* has, \(2, 3\)"):
        halo(torch.ones(partition.local_shape), partition, (3, 1))
