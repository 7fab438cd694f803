"""The matrix of a stencil operator on one rank, for grids and stencils of any size."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from petsc4py import PETSc

from pnode_dist import GridPartition, Mesh
from pnode_dist.partition.stencil_jacobian import StencilJacobian
from tests.oracles.stencils import stencil_matrix


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One rank."""
    with Mesh() as mesh:
        yield mesh


@settings(max_examples=60, deadline=None)
@given(
    axes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 3), st.sampled_from(["periodic", "replicate", "zero"])),
        min_size=1,
        max_size=3,
    ).filter(lambda axes: math.prod(n for n, _, _ in axes) <= 81),
    channels=st.integers(1, 2),
    leading=st.sampled_from([(), (1,), (3,), (2, 1)]),
    shift=st.floats(-10, 10),
)
def test_every_entry_is_found_exactly(
    mesh: Mesh,
    axes: list[tuple[int, int, str]],
    channels: int,
    leading: tuple[int, ...],
    shift: float,
) -> None:
    shape, width, boundary = zip(*axes, strict=True)
    samples = torch.Size(leading).numel()
    whole = stencil_matrix(shape, channels, samples, width, boundary, seed=1)
    partition = GridPartition(mesh, shape, channels=channels, boundary=boundary, stencil_width=0)
    jacobian = StencilJacobian(partition, width, (*leading, *partition.local_shape))
    mass = torch.linspace(0, 1, len(whole), dtype=torch.float64)
    matrix = jacobian.assemble(lambda v: whole @ v, shift, mass)
    dense = matrix.convert("dense", PETSc.Mat())  # whose array does not keep it alive in PETSc 3.22
    assert torch.equal(torch.from_numpy(dense.getDenseArray()), torch.diag(shift * mass) - whole)
