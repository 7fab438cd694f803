"""Observation operators and covariances at every number of ranks: those of the whole field, and their transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator

from pnode_dist import ConfigurationError, DensePartition, GraphPartition, GridPartition, Mesh
from pnode_dist.inverse import Dense, GlobalMean, GridCovariance, Points, Subsample
from tests.mpi.grids import block
from tests.oracles.assimilation import islands_root, matern_root
from tests.oracles.right_hand_sides import random

pytestmark = pytest.mark.mpi

BOUNDARY = ("periodic", "replicate", "zero")
SHAPES = [(7,), (6, 5), (4, 5, 6)]


def check(mesh: Mesh, operator: Any, own: torch.Tensor, whole: torch.Tensor, weights: torch.Tensor) -> None:
    """Compare values and the transpose of a linear operator with those of `whole`, the values of all ranks."""
    leaf = own.clone().requires_grad_()
    values = operator(leaf)
    assert torch.allclose(values, operator.part_of(whole), rtol=1e-13, atol=1e-14)
    assert mesh.sum(torch.tensor(values.numel())).item() == whole.numel()
    mine = operator.part_of(weights)
    (pulled,) = torch.autograd.grad(values, leaf, mine)
    left = mesh.sum((pulled * own).sum())
    assert left.item() == pytest.approx((whole * weights).sum().item(), rel=1e-12)
    pushed = torch.func.jvp(operator, (own,), (own,))[1]
    assert torch.allclose(pushed, values.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_a_subsample_is_that_of_the_whole_field(shape: tuple[int, ...], mesh: Mesh) -> None:
    grid = GridPartition(mesh, shape, 2, BOUNDARY[: len(shape)])
    whole = random(*shape, 2)
    chosen = whole[tuple(slice(1, None, 3) for _ in shape)]
    operator = (
        Subsample(grid, 3, 1) if len(shape) == 1 else Subsample(grid, (*(3,) * len(shape), 1), (*(1,) * len(shape), 0))
    )
    assert operator.shape == tuple(chosen.shape)
    check(mesh, operator, block(grid, whole), chosen, random(*chosen.shape, seed=3))
    every_second = Subsample(grid, 2)
    assert torch.equal(
        every_second(block(grid, whole)), every_second.part_of(whole[tuple(slice(0, None, 2) for _ in shape)])
    )


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_values_at_points_are_those_of_linear_interpolation(shape: tuple[int, ...], mesh: Mesh) -> None:
    grid = GridPartition(mesh, shape, 2, BOUNDARY[: len(shape)])
    whole = random(*shape, 2)
    # The first axis is periodic: its end is its beginning.
    axes = [np.arange(shape[0] + 1), *(np.arange(n) for n in shape[1:])]
    wrapped = np.concatenate([whole.numpy(), whole.numpy()[:1]])
    ends = np.array([axis[-1] for axis in axes], dtype=float)
    points = np.concatenate([np.random.default_rng(0).uniform(0, ends, (9, len(shape))), ends[None], 0 * ends[None]])
    wanted = torch.from_numpy(RegularGridInterpolator(axes, wrapped)(points))
    check(mesh, Points(grid, points), block(grid, whole), wanted, random(*wanted.shape, seed=3))


def test_the_mean_belongs_to_one_rank(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (6, 5), 3, "periodic")
    whole, areas = random(6, 5, 3), random(6, 5, seed=2).abs()
    own, own_areas = block(grid, whole), block(grid, areas[..., None])[..., 0]
    check(mesh, GlobalMean(grid), own, whole.mean((0, 1))[None], random(1, 3, seed=3))
    weighted = (whole * areas[..., None]).sum((0, 1))[None] / areas.sum()
    check(mesh, GlobalMean(grid, own_areas), own, weighted, random(1, 3, seed=3))
    with pytest.raises(ConfigurationError, match="weights: shape"):
        GlobalMean(grid, own_areas[1:] if mesh.rank == 0 else own_areas)


def test_nodes_and_entries_are_subsampled_too(mesh: Mesh) -> None:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0]])
    owner = np.arange(7) % mesh.size
    graph = GraphPartition(mesh, edges if mesh.is_root else None, 7, 2, ownership=owner if mesh.is_root else None)
    whole = random(7, 2)
    own = whole[torch.from_numpy(np.flatnonzero(owner == mesh.rank))]
    check(mesh, Subsample(graph, 2, 1), own, whole[1::2, 0:], random(3, 2, seed=3))
    dense = DensePartition(mesh, 9)
    vector = random(9)
    check(mesh, Subsample(dense, 4), vector[slice(*dense.owned)], vector[::4], random(3, seed=3))


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_the_covariance_of_a_grid_is_that_of_its_dense_matrix(shape: tuple[int, ...], mesh: Mesh) -> None:
    grid = GridPartition(mesh, shape, 2, BOUNDARY[: len(shape)])
    spacing, length = (0.1, 0.2, 0.25)[: len(shape)], 0.3
    covariance = GridCovariance(grid, (1.5, 0.5), length, spacing)
    root = matern_root(shape, [length / width for width in spacing], [rule == "periodic" for rule in grid.boundary])
    whole = random(*shape, 2)

    def applied(matrix: torch.Tensor) -> torch.Tensor:
        return torch.stack([(matrix @ whole[..., k].reshape(-1)).view(shape) for k in range(2)], dim=-1)

    deviation = torch.tensor([1.5, 0.5], dtype=torch.float64)
    inverse = torch.linalg.inv(root)
    pairs: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = [
        (covariance.root, applied(root) * deviation),
        (covariance.root_solve, applied(inverse) / deviation),
        (covariance.multiply, applied(root @ root) * deviation**2),
        (covariance.solve, applied(inverse @ inverse) / deviation**2),
    ]
    for function, wanted in pairs:
        found = function(block(grid, whole))
        assert torch.allclose(found, block(grid, wanted), rtol=1e-9, atol=1e-10 * wanted.abs().max().item())
    leading = covariance.root(block(grid, torch.stack([whole, 2 * whole])))
    assert torch.allclose(leading[1], 2 * covariance.root(block(grid, whole)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_the_covariance_of_a_masked_grid_leaves_points_outside_alone(shape: tuple[int, ...], mesh: Mesh) -> None:
    grid = GridPartition(mesh, shape, 2, BOUNDARY[: len(shape)])
    spacing, length = (0.1, 0.2, 0.25)[: len(shape)], 0.3
    sea = random(*shape) > -0.7
    assert 0 < (~sea).sum() < sea.numel() / 2
    inside = sea[tuple(slice(*owned) for owned in grid.owned)]
    covariance = GridCovariance(grid, (1.5, 0.5), length, spacing, inside)
    cells = [length / width for width in spacing]
    root = islands_root(shape, cells, [rule == "periodic" for rule in grid.boundary], sea.numpy())
    whole, deviation = random(*shape, 2), torch.tensor([1.5, 0.5], dtype=torch.float64)

    def applied(matrix: torch.Tensor) -> torch.Tensor:
        return torch.stack([(matrix @ whole[..., k].reshape(-1)).view(shape) for k in range(2)], dim=-1)

    own = block(grid, whole)
    for found, wanted in (
        (covariance.root(own), applied(root) * deviation),
        (covariance.root_solve(own), applied(torch.linalg.inv(root)) / deviation),
        (covariance.variances(own), (root @ root.T).diagonal().view(*shape, 1) * deviation**2),
    ):
        torch.testing.assert_close(found, block(grid, wanted), rtol=1e-9, atol=1e-9)
    outside = ~inside
    torch.testing.assert_close(covariance.root(own)[outside], own[outside] * deviation, rtol=1e-12, atol=0)


def test_a_mask_of_another_shape_is_refused(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (8,), 1, "periodic")
    with pytest.raises(ConfigurationError, match="covariance: inside has shape"):
        GridCovariance(grid, 1.0, 2.0, inside=torch.ones(9, dtype=torch.bool))


def test_the_variance_of_a_grid_covariance_is_the_one_asked_for(mesh: Mesh) -> None:
    grid = GridPartition(mesh, (96,), 1, "periodic")
    covariance = GridCovariance(grid, 2.0, 6.0)
    unit = torch.zeros(96, 1, dtype=torch.float64)
    unit[40] = 1
    column = grid.gather(covariance.multiply(block(grid, unit)))
    if mesh.is_root:
        assert column is not None
        assert column[40].item() == pytest.approx(4.0, rel=0.02)
        # A Matern covariance of smoothness 3/2 in one dimension: (1 + r) exp(-r).
        assert column[46].item() == pytest.approx(4.0 * 2 * np.exp(-1), rel=0.02)


def test_a_dense_covariance_is_its_matrix() -> None:
    factor = random(4, 4)
    matrix = factor @ factor.T + torch.eye(4, dtype=torch.float64)
    covariance, x = Dense(matrix), random(2, 2, seed=4)
    flat = x.reshape(-1)
    assert torch.allclose(covariance.multiply(x).reshape(-1), matrix @ flat)
    assert torch.allclose(covariance.solve(x).reshape(-1), torch.linalg.solve(matrix, flat))
    assert torch.allclose(covariance.root_solve(covariance.root(x)), x)
    assert torch.allclose(covariance.root_solve_transpose(covariance.root_transpose(x)), x)
