"""Settings are refused on all ranks alike, and a change that one rank sees is one for all."""

from __future__ import annotations

import warnings

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist import BatchPartition, ConfigurationError, Mesh, NeuralODE, odeint
from pnode_dist.ode import coarse
from pnode_dist.ode.rhs.split import MatrixFunction

pytestmark = pytest.mark.mpi

TIMES, SHAPE = [0.0, 1.0], (1,)


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -u


def growth(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return u


@pytest.mark.parametrize("option", ["ksp_nonsense", "step_size", "nonsense"])
@pytest.mark.parametrize("method", ["rk4", "cn", "beuler"])
def test_an_option_that_nothing_reads_is_refused_on_every_rank(mesh: Mesh, method: str, option: str) -> None:
    batch = BatchPartition(mesh, 5 * MPI.COMM_WORLD.size, SHAPE)
    start = torch.ones(batch.local_shape, dtype=torch.float64)
    node = NeuralODE(decay, method=method, step_size=0.25, partition=batch, options={option: 1})
    with pytest.raises(ConfigurationError, match=option):
        node(start, TIMES)
    node.options = None
    assert torch.isfinite(node(start, TIMES)).all()


def test_options_of_pieces_that_only_some_ranks_read_are_taken(mesh: Mesh) -> None:
    rows = 4 * MPI.COMM_WORLD.size
    batch = BatchPartition(mesh, rows, SHAPE)
    start = torch.ones(batch.local_shape, dtype=torch.float64)
    matrix = PETSc.Mat().createAIJ(((4, rows), (4, rows)), nnz=1, comm=batch.comm)
    for row in range(*matrix.getOwnershipRange()):
        matrix.setValue(row, row, -2.0)
    matrix.assemble()
    options = {"ksp_type": "gmres", "pc_type": "bjacobi", "sub_pc_type": "jacobi"}
    node = NeuralODE(MatrixFunction(matrix), method="beuler", step_size=0.1, partition=batch, options=options)
    end = node(start, TIMES)[-1]
    assert torch.allclose(end, torch.full_like(end, 1.2**-10), rtol=1e-8)


def test_a_mass_that_one_rank_changes_in_place_is_a_change_for_all(mesh: Mesh) -> None:
    batch = BatchPartition(mesh, 3 * MPI.COMM_WORLD.size, SHAPE)
    start = torch.ones(batch.local_shape, dtype=torch.float64)
    mass = torch.full_like(start, 4.0)
    node = NeuralODE(decay, method="beuler", step_size=0.1, partition=batch, mass=mass)
    last = MPI.COMM_WORLD.size - 1
    for value in (4.0, 6.0, 5.0):
        if MPI.COMM_WORLD.rank == last:
            mass.fill_(value)
        expected = (1 + 0.1 / mass) ** -10
        assert torch.allclose(node(start, TIMES)[-1], expected, rtol=1e-8)
    if MPI.COMM_WORLD.rank == last:
        # Another object with the same contents, on one rank alone.
        node.mass = mass.clone()
    assert torch.allclose(node(start, TIMES)[-1], (1 + 0.1 / mass) ** -10, rtol=1e-8)


@pytest.mark.parametrize("looked_at", [False, True])
def test_ranks_look_together_at_a_step_that_is_too_long(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, looked_at: bool
) -> None:
    monkeypatch.setattr(coarse, "_looked_at", set())
    rank, batch = MPI.COMM_WORLD.rank, BatchPartition(mesh, 2 * MPI.COMM_WORLD.size, SHAPE)
    start = torch.ones(batch.local_shape, dtype=torch.float64)
    if looked_at and rank == 0:
        # Rank 0 has solved this on its own before; the state of rank 0 alone would be fine.
        odeint(growth, start, [0.0, 0.01], method="euler")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            odeint(growth, start, [0.0, 5.9], method="euler", partition=batch)
    # One rank that has looked at such a solve before does not look again.
    alone_again = looked_at and MPI.COMM_WORLD.size == 1
    assert sum("is too long" in str(one.message) for one in caught) == (rank == 0 and not alone_again)
