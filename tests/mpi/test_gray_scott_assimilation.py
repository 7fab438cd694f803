"""The inverse problem of Gray-Scott at every number of ranks: J and its gradient are those of plain torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.problems.gray_scott.problem import GrayScottProblem
from tests.mpi.grids import block
from tests.oracles.assimilation import matern_root, states_at
from tests.unit.problems.gray_scott.plain_gray_scott import DOMAIN, INTERVAL, NX, NY, config

pytestmark = pytest.mark.mpi

STEP, EVERY, OBSERVED, NOISE, LENGTH, DEVIATION = 2.0, 3, 2, 0.05, 0.04, (0.3, 0.1)
INVERSE = {"every": EVERY, "observed": OBSERVED, "noise": NOISE, "length": LENGTH, "deviation": DEVIATION}
SPACING = (DOMAIN[0] / NY, DOMAIN[1] / NX)
TIMES = [0.0, INTERVAL, 2 * INTERVAL]


def small(mesh: Mesh) -> GrayScottProblem:
    shortest: dict[str, Any] = {"problem": {"times": 3, "trajectories": 4}, "evaluation": {"leads": (1, 2)}}
    tables = config(inverse=INVERSE, training={"batch_size": 4}, **shortest)
    return GrayScottProblem(tables, mesh, torch.float64)


def rates(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The equations on the whole grid, by torch.roll."""
    u, v = state.unbind(-1)

    def laplacian(c: torch.Tensor) -> torch.Tensor:
        along = (c.roll(1, axis) + c.roll(-1, axis) - 2 * c for axis in (0, 1))
        return sum((part / width**2 for part, width in zip(along, SPACING, strict=True)), torch.zeros_like(c))

    reaction = u * v**2
    u_rate = 8e-5 * laplacian(u) - reaction + 0.024 * (1 - u)
    return torch.stack([u_rate, 4e-5 * laplacian(v) + reaction - 0.084 * v], dim=-1)


@pytest.mark.nightly
def test_the_cost_of_an_initial_state_is_that_in_plain_torch(mesh: Mesh) -> None:
    problem = small(mesh)
    inverse = problem.inverse()
    whole = np.concatenate([part.reshape(-1) for part in mesh.state_comm.allgather(problem.twin.data.numpy())])
    assert len(whole) == OBSERVED * math.ceil(NY / EVERY) * math.ceil(NX / EVERY) * 2
    with Mesh(state=1, data=mesh.size) as replicas:
        twin = small(replicas).twin
    data, truth = (values[1 : OBSERVED + 1, ::EVERY, ::EVERY] for values in (twin.observed, twin.truth))
    np.testing.assert_allclose(np.sort(whole), np.sort(data.numpy().ravel()), rtol=1e-9)
    assert data.isfinite().all()
    assert 0.5 * NOISE < (data - truth).std() < 1.5 * NOISE
    root = matern_root((NY, NX), [LENGTH / width for width in SPACING], [True, True])
    rest = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(NY, NX, 2)

    def cost(state: torch.Tensor) -> torch.Tensor:
        states = states_at(rates, state, TIMES, STEP)
        seen = torch.stack([states[time][::EVERY, ::EVERY] for time in TIMES[1:]])
        prior = torch.linalg.solve(root, (state - rest).reshape(-1, 2)) / torch.tensor(DEVIATION, dtype=torch.float64)
        return ((seen - data) / NOISE).square().sum() / 2 + prior.square().sum() / 2

    state = (rest + 0.1 * torch.randn(NY, NX, 2, dtype=torch.float64, generator=torch.manual_seed(1))).requires_grad_()
    wanted = cost(state)
    (gradient,) = torch.autograd.grad(wanted, state)
    m = inverse.space.pack([block(problem.partition, state.detach())])
    assert inverse(m) == pytest.approx(wanted.item(), rel=1e-9)
    (found,) = inverse.space.unpack(inverse.derivative())
    own = block(problem.partition, gradient)
    assert (found - own).norm() <= 1e-8 * gradient.norm()
    (start,) = inverse.space.unpack(inverse.space.guess())
    assert torch.equal(start, block(problem.partition, rest))
    assert MPI.COMM_WORLD.allreduce(start.numel()) == NY * NX * 2
