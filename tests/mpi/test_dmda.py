"""A partition that follows a user's DMDA has its layout, its halo and its solves, also where blocks are uneven."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist import ConfigurationError, GridPartition, Mesh, odeint
from pnode_dist.exchange.grid_halo import halo
from tests.mpi.grids import block
from tests.oracles.fields import padded
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

SIZE = MPI.COMM_WORLD.size
# Blocks that no even division gives: 2, 4, 6, ... points.
UNEVEN = tuple(2 * (rank + 1) for rank in range(SIZE))


@dataclass(frozen=True)
class Case:
    """A DMDA with uneven blocks along its last axis but one, in PETSc's order x, y, z, and the rules it stands for."""

    sizes: tuple[int, ...]
    boundary: tuple[str, ...]
    rules: tuple[str, ...]
    dof: int = 1
    width: int = 1
    star: bool = False

    def create(self) -> PETSc.DMDA:
        axes = len(self.sizes)
        cut = max(axes - 2, 0)
        counts = [1] * axes
        counts[cut] = SIZE
        return PETSc.DMDA().create(
            sizes=tuple(sum(UNEVEN) if axis == cut else n for axis, n in enumerate(self.sizes)),
            dof=self.dof,
            boundary_type=self.boundary,
            stencil_type=PETSc.DMDA.StencilType.STAR if self.star else PETSc.DMDA.StencilType.BOX,
            stencil_width=self.width,
            proc_sizes=tuple(counts),
            ownership_ranges=tuple(UNEVEN if axis == cut else (n,) for axis, n in enumerate(self.sizes)),
        )


CASES = [
    Case((0,), ("periodic",), ("periodic",), dof=2, width=2),
    Case((0,), ("mirror",), ("reflect",), star=True),
    Case((0, 5), ("periodic", "none"), ("zero", "periodic"), dof=3, star=True),
    Case((4, 0, 3), ("ghosted", "periodic", "periodic"), ("periodic", "periodic", "zero"), dof=2),
]


def whole_of(da: PETSc.DMDA, vec: PETSc.Vec) -> np.ndarray[Any, Any]:
    """The entries of a global Vec in PETSc's natural order, `[z, y, x, dof]`, on every rank."""
    natural = da.createNaturalVec()
    da.globalToNatural(vec, natural)
    flat = np.concatenate(MPI.COMM_WORLD.allgather(natural.getArray().copy()))
    return flat.reshape(*da.getSizes()[::-1], da.getDof())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case.sizes)} axes {case.boundary[0]}")
def test_global_vecs_of_both_agree_entry_by_entry(case: Case, mesh: Mesh) -> None:
    da = case.create()
    partition = GridPartition.from_dmda(da, mesh)
    assert partition.dm is da
    assert partition.boundary == case.rules
    assert (partition.channels, partition.stencil_width) == (case.dof, case.width)
    assert partition.owned == tuple(reversed(da.getRanges()))
    whole = random(*partition.global_shape)
    for vec in (da.createGlobalVec(), partition.create_vec()):
        partition.view(vec).copy_(partition.scatter(whole))
        assert np.array_equal(whole_of(da, vec), whole.numpy())
    inside = PETSc.Vec().createMPI((math.prod(partition.local_shape), None), comm=mesh.state_comm)
    assert inside.getOwnershipRange() == da.createGlobalVec().getOwnershipRange()
    made = GridPartition(
        mesh,
        partition.shape,
        case.dof,
        case.rules,
        case.width,
        ownership=[r.tolist() for r in da.getOwnershipRanges()][::-1],
    )
    assert made.dm is not da
    assert made.ranges == partition.ranges
    assert made.dm.getRanges() == da.getRanges()


@pytest.mark.parametrize("case", CASES[:2] + CASES[3:], ids=lambda case: f"{len(case.sizes)} axes {case.boundary[0]}")
def test_halos_of_uneven_blocks_are_those_of_the_padded_whole_field(case: Case, mesh: Mesh) -> None:
    partition = GridPartition.from_dmda(case.create(), mesh)
    width = (case.width,) * len(partition.shape)
    whole = random(*partition.global_shape).requires_grad_()
    wanted = padded(whole, partition.boundary, width)
    local = block(partition, whole).detach().requires_grad_()
    found = halo(local, partition, width)
    assert torch.equal(found, block(partition, wanted, width))
    found.square().sum().backward()
    shares = [block(partition, wanted, width, rank).square().sum() for rank in range(SIZE)]
    (gradient,) = torch.autograd.grad(sum(shares[1:], shares[0]), [whole])
    assert distance(local.grad, block(partition, gradient)) <= 1e-13  # type: ignore[arg-type]


def test_a_periodic_halo_is_what_the_dmda_itself_exchanges(mesh: Mesh) -> None:
    da = CASES[0].create()
    partition = GridPartition.from_dmda(da, mesh)
    inside, around = da.createGlobalVec(), da.createLocalVec()
    local = block(partition, random(*partition.global_shape))
    partition.view(inside).copy_(local)
    da.globalToLocal(inside, around)
    found = halo(local, partition, (2,))
    assert np.array_equal(found.numpy(), around.getArray().reshape(found.shape))


def test_a_solve_on_the_partition_of_a_dmda_is_that_of_the_whole_field(mesh: Mesh) -> None:
    partition = GridPartition.from_dmda(Case((0,), ("periodic",), ("periodic",)).create(), mesh)

    def diffusion(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        wide = halo(u, partition, (1,))
        return wide[:-2] - 2 * wide[1:-1] + wide[2:]

    def plain(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u.roll(1, 0) - 2 * u + u.roll(-1, 0)

    whole, times = random(*partition.global_shape), [0.0, 0.2]
    found = odeint(diffusion, block(partition, whole), times, partition=partition, step_size=0.1)[-1]
    wanted = odeint_plain(plain, whole, times, TABLEAUX["4"], 0.1)[-1]
    assert distance(found, block(partition, wanted)) <= 1e-13


def test_uneven_blocks_are_coarsened_and_refined_where_they_are(mesh: Mesh) -> None:
    partition = GridPartition.from_dmda(Case((0, 4), ("periodic", "none"), ()).create(), mesh)
    coarse = partition.coarsened(2)
    assert coarse.owned == tuple((start // 2, stop // 2) for start, stop in partition.owned)
    assert coarse.refined(2).ranges == partition.ranges
    assert partition.smallest_block(1) == 2


def test_rules_of_one_s_own_must_not_contradict_the_dmda(mesh: Mesh) -> None:
    da = Case((0, 5), ("periodic", "none"), ()).create()
    assert GridPartition.from_dmda(da, mesh, ("reflect", "periodic")).boundary == ("reflect", "periodic")
    with pytest.raises(ConfigurationError, match=r"boundary of x = 'zero': the DMDA's is periodic, so it must be 'per"):
        GridPartition.from_dmda(da, mesh, "zero")
    with pytest.raises(
        ConfigurationError, match=r"boundary of y = 'periodic': the DMDA's is none, so it must be a rule"
    ):
        GridPartition.from_dmda(da, mesh, "periodic")
    with pytest.raises(ConfigurationError, match="one entry for each of 2 axes"):
        GridPartition.from_dmda(da, mesh, ("zero",))


def test_a_dmda_that_no_partition_can_follow_is_refused_by_name(mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match="boundary type of x = twist: must be one of none, ghosted, mirror"):
        GridPartition.from_dmda(PETSc.DMDA().create(sizes=(8 * SIZE, 8), boundary_type=("twist", "none")), mesh)
    with pytest.raises(ConfigurationError, match="DMDA: is not set up: call its setUp"):
        GridPartition.from_dmda(PETSc.DMDA().create(sizes=(8 * SIZE, 8), setup=False), mesh)
    with pytest.raises(ConfigurationError, match="DMDA: got plex: must be a DMDA of petsc4py"):
        GridPartition.from_dmda(PETSc.DMPlex().create(), mesh)  # type: ignore[arg-type]
    if SIZE > 1:
        alone = PETSc.DMDA().create(sizes=(8,), comm=MPI.COMM_SELF)
        with pytest.raises(ConfigurationError, match=rf"over 1 rank\(s\), and the mesh's state over {SIZE}"):
            GridPartition.from_dmda(alone, mesh)


@pytest.mark.parametrize(
    ("ownership", "complaint"),
    [
        ([[3] * SIZE], "must have one entry for each of y, x"),
        ([[5], [3] * SIZE], rf"ownership of x = {[3] * SIZE}".replace("[", r"\[").replace("]", r"\]")),
        ([[5], [8 * SIZE - 8, *[8] * SIZE]], "must multiply to"),
    ],
    ids=["axes", "sum", "ranks"],
)
def test_an_ownership_that_does_not_fit_is_refused(ownership: Any, complaint: str, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        GridPartition(mesh, (5, 16 * SIZE - 8), ownership=ownership)
