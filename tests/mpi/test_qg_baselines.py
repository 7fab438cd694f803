"""Published closures of quasi-geostrophic turbulence at every number of ranks: the numbers of pyqg."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import global_sum, irfft2
from pnode_dist.problems.qg.baselines import Backscatter, Smagorinsky, ZannaBolton
from pnode_dist.problems.qg.config import EDDY, JET, QGParameters
from pnode_dist.problems.qg.physics import QGTendency
from tests.oracles.right_hand_sides import random

pytestmark = pytest.mark.mpi

# Written by pyqg_reference.py beside it.
FILE = Path(__file__).parents[1] / "oracles" / "pyqg_reference.npz"
PARAMETERS = {"eddy": replace(EDDY, L=4e5), "jet": replace(JET, L=4e5)}
CLOSURES: dict[str, Callable[..., nn.Module]] = {
    "smagorinsky": Smagorinsky,
    "backscatter": Backscatter,
    "zanna_bolton": ZannaBolton,
}


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(FILE) as file:
        return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}


@pytest.fixture(params=["slabs", "blocks"])
def grid(request: pytest.FixtureRequest, mesh: Mesh) -> GridPartition:
    processes = (mesh.state_ranks, 1) if request.param == "slabs" else None
    return GridPartition(mesh, (16, 16), 2, "periodic", 1, processes)


def own(partition: GridPartition, whole: torch.Tensor) -> torch.Tensor:
    return whole[(..., *partition.owned_slices(partition.comm.rank))].clone()


def fields(grid: GridPartition, parameters: QGParameters, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, u and v of this rank."""
    block = own(grid, q)
    return block, *QGTendency(grid, parameters).velocities(block)


@pytest.mark.parametrize("kind", CLOSURES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_the_forcing_is_that_of_pyqg(
    name: str, kind: str, grid: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    given = fields(grid, PARAMETERS[name], reference["q"])
    wanted = reference[f"{name}_{kind}"]
    found = CLOSURES[kind](grid, PARAMETERS[name])(*given)
    assert float((found - own(grid, wanted)).abs().max() / wanted.abs().max()) <= 1e-13
    single = CLOSURES[kind](grid, PARAMETERS[name], dtype=torch.float32)(*(field.float() for field in given))
    assert single.dtype == torch.float32
    assert float((single - own(grid, wanted)).abs().max() / wanted.abs().max()) <= 1e-5


def test_each_sample_of_a_batch_is_scattered_back_by_itself(
    grid: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    parameters = PARAMETERS["eddy"]
    closure = Backscatter(grid, parameters)
    batch = torch.stack([reference["q"], reference["q"].flip(-1), 2 * reference["q"].flip(0)])
    found = closure(*fields(grid, parameters, batch))
    for number, q in enumerate(batch):
        alone = closure(*fields(grid, parameters, q))
        assert float((found[number] - alone).abs().max() / alone.abs().max()) <= 1e-13


def test_backscatter_returns_its_share_of_the_energy(grid: GridPartition, reference: dict[str, torch.Tensor]) -> None:
    parameters = PARAMETERS["eddy"]
    q, u, v = fields(grid, parameters, reference["q"])
    equations = QGTendency(grid, parameters)
    psi = irfft2(equations.inverted(q), equations.spectrum)
    thickness = torch.tensor([0.2, 0.8], dtype=torch.float64)

    def energy_rate(returned: float) -> float:
        forcing = Backscatter(grid, parameters, returned=returned)(q, u, v)
        return float(global_sum((-psi * forcing * thickness).sum(), grid.comm))

    lost = energy_rate(0.0)
    assert lost < 0
    assert energy_rate(0.75) == pytest.approx(0.25 * lost, rel=1e-10)
    assert abs(energy_rate(1.0)) <= 1e-12 * abs(lost)


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_derivative_of_the_published_closures_is_a_difference(
    kind: str, grid: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    parameters = PARAMETERS["eddy"]
    closure = CLOSURES[kind](grid, parameters)
    weight, direction = own(grid, random(16, 16, 2, seed=3)), 1e-5 * own(grid, random(16, 16, 2, seed=4))
    q = own(grid, reference["q"]).requires_grad_()

    def value(q: torch.Tensor) -> torch.Tensor:
        forcing = closure(q, *QGTendency(grid, parameters).velocities(q))
        return (1e10 * weight * forcing).sum()

    (slope,) = torch.autograd.grad(value(q), q)
    step = 1e-4
    with torch.no_grad():
        difference = (value(q + step * direction) - value(q - step * direction)) / (2 * step)
    found, wanted = global_sum(torch.stack([(slope * direction).sum(), difference]), grid.comm)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_fluid_at_rest_stays_at_rest_and_differentiable(kind: str, grid: GridPartition) -> None:
    fields = [torch.zeros(grid.local_shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    forcing = CLOSURES[kind](grid)(*fields)
    assert float(forcing.detach().abs().max()) == 0
    slopes = torch.autograd.grad(forcing.sum(), fields, allow_unused=True)
    assert all(slope is None or bool(slope.isfinite().all()) for slope in slopes)


def test_a_constant_out_of_range_is_refused(grid: GridPartition) -> None:
    with pytest.raises(ConfigurationError, match=r"closure: constant = -0\.1: must be at least 0"):
        Smagorinsky(grid, constant=-0.1)
    with pytest.raises(ConfigurationError, match=r"closure: returned = -1\.0: must be at least 0"):
        Backscatter(grid, returned=-1.0)
    with pytest.raises(ConfigurationError, match=r"closure: constant = inf: must be finite"):
        ZannaBolton(grid, constant=float("inf"))
