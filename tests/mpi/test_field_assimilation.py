"""The inverse problem of a field at every number of ranks: J and its gradient are those of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.problems.field.problem import FieldProblem
from tests.mpi.grids import block
from tests.mpi.test_field import HARMONICS, SUBSTEPS, TRAINING, build, leaves, plain
from tests.oracles.assimilation import islands_root
from tests.unit.problems.field.synthetic_fields import NX, NY, dataset, land, values, write

pytestmark = pytest.mark.mpi

START, EVERY, OBSERVED, NOISE, DEVIATION, LENGTH = 1, 2, 2, 0.3, 0.8, (1.5, 2.5)
INVERSE = {"start": START, "every": EVERY, "observed": OBSERVED, "forecast": 1}
PRIOR = {"noise": NOISE, "deviation": DEVIATION, "length": LENGTH}
FIRST = TRAINING + START


@pytest.fixture(autouse=True)
def files(directory: Path, mesh: Mesh) -> None:
    """Fields of one channel and of two, in the directory of all ranks."""
    if mesh.is_root:
        write(directory / "sst.nc", dataset(values()))
        write(directory / "two.nc", dataset(values(channels=2)))
    MPI.COMM_WORLD.Barrier()


def small(directory: Path, mesh: Mesh, name: str = "sst.nc") -> FieldProblem:
    tables: dict[str, Any] = {"inverse": INVERSE | PRIOR, "training": {"batch_size": 4}}
    return build(directory, mesh, name, **tables)


@pytest.mark.parametrize(("name", "channels"), [("sst.nc", None), ("two.nc", 2)])
def test_the_cost_of_the_initial_field_is_that_in_plain_torch(
    directory: Path, mesh: Mesh, name: str, channels: int | None
) -> None:
    problem, whole = small(directory, mesh, name), plain(directory, name, channels)
    inverse = problem.inverse()
    with Mesh(state=1, data=mesh.size) as replicas:
        observed = small(directory, replicas, name).known.observed
    seen = observed.isfinite().numpy()
    grid = np.zeros((NY, NX), dtype=bool)
    grid[::EVERY, ::EVERY] = True
    assert (seen[:OBSERVED] == (grid & ~land())[..., None]).all()
    assert not seen[OBSERVED:].any()
    deviation = torch.from_numpy(whole.moments()[1])
    places = torch.from_numpy(seen)
    errors = ((observed - whole.normalised()[FIRST : FIRST + len(observed)]) * deviation)[places]
    assert 0.6 * NOISE < errors.std() < 1.4 * NOISE
    angle = 2 * np.pi * whole.phases[FIRST] * np.arange(1, HARMONICS + 1)
    basis = np.concatenate([[1.0], np.cos(angle), np.sin(angle)])
    guess = torch.from_numpy(np.tensordot(basis, whole.cycle(HARMONICS), axes=1))
    root = islands_root((NY, NX), LENGTH, whole.periodic, ~land())
    sea = torch.from_numpy(~land())[..., None]

    def cost(initial: torch.Tensor) -> torch.Tensor:
        # Nothing but the prior of the land depends on the land.
        later = whole.forecast(leaves(problem), HARMONICS, [FIRST], OBSERVED - 1, SUBSTEPS, (initial * sea)[None])
        states = torch.cat([initial[None], later[:, 0]])
        misfit = ((states - observed[:OBSERVED]) * deviation / NOISE)[places[:OBSERVED]]
        departure = torch.linalg.solve(root, ((initial - guess) * deviation / DEVIATION).reshape(NY * NX, -1))
        return (misfit.square().sum() + departure.square().sum()) / 2

    noise = torch.randn(guess.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    state = (guess + 0.2 * noise).requires_grad_()
    wanted = cost(state)
    (gradient,) = torch.autograd.grad(wanted, state)
    m = inverse.space.pack([block(problem.partition, state.detach())])
    assert inverse(m) == pytest.approx(wanted.item(), rel=1e-9)
    (found,) = inverse.space.unpack(inverse.derivative())
    torch.testing.assert_close(found, block(problem.partition, gradient), rtol=1e-8, atol=1e-8 * gradient.abs().max())
    (start,) = inverse.space.unpack(inverse.space.guess())
    torch.testing.assert_close(start, block(problem.partition, guess), rtol=1e-12, atol=1e-12)
