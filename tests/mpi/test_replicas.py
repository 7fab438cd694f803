"""The training of every problem is the same however the ranks are split into state ranks and replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.train.run import build_problem
from tests.mpi.conftest import SPLITS
from tests.oracles.right_hand_sides import distance
from tests.unit.problems.field import synthetic_fields
from tests.unit.problems.graph_diffusion import plain_graph_diffusion
from tests.unit.problems.gray_scott import plain_gray_scott
from tests.unit.problems.pendulum import plain_pendulum
from tests.unit.problems.robertson import plain_robertson
from tests.unit.problems.semilinear import plain_semilinear

pytestmark = pytest.mark.mpi

# In batches of 4, of which the last leaves some of four replicas without any window.
TRAINING = {"batch_size": 4}
TIGHT = {"petsc_options": {"snes_rtol": 1e-12, "snes_divergence_tolerance": 1e30}}


def sea_surface(directory: Path) -> Any:
    path = directory / "sst.nc"
    if MPI.COMM_WORLD.rank == 0:
        synthetic_fields.write(path, synthetic_fields.dataset(synthetic_fields.values()))
    MPI.COMM_WORLD.Barrier()
    return synthetic_fields.config(path, training=TRAINING)


CONFIGURATIONS: dict[str, Callable[[Path], Any]] = {
    "field": sea_surface,
    "graph_diffusion": lambda _: plain_graph_diffusion.config(training=TRAINING),
    "gray_scott": lambda _: plain_gray_scott.config(training=TRAINING),
    "burgers": lambda _: plain_semilinear.config("burgers", training=TRAINING),
    "pendulum": lambda _: plain_pendulum.config(training=TRAINING, solver=TIGHT, problem={"window": 1}),
    "robertson": lambda _: plain_robertson.config(training=TRAINING, solver=TIGHT),
}


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_loss_and_gradient_of_a_batch_are_the_same_on_any_mesh(name: str, directory: Path) -> None:
    config = CONFIGURATIONS[name](directory)
    found = {}
    for state, data in dict.fromkeys((SPLITS[0], SPLITS[-1])):
        with Mesh(state, data) as mesh:
            problem = build_problem(config, mesh, torch.float64)
            model = parallel(problem.model, mesh)
            losses, used = [], []
            for batch in list(problem.batches(1))[-2:]:
                used.append(len(batch.starts))
                share = problem.loss(model, batch)
                share.backward()  # type: ignore[no-untyped-call]
                losses.append(mesh.sum(share) / data)
            sizes = mesh.sum(torch.tensor(used), over="data")
            gradients = [value.grad.clone() for value in problem.model.parameters() if value.grad is not None]
            found[state, data] = torch.stack(losses), gradients, sizes
    first_losses, first_gradients, first_sizes = found[SPLITS[-1]]
    assert first_sizes[0] == 4 > first_sizes[1]
    # Implicit steps end at their tolerance, at a different point for every way of adding up norms.
    near = 1e-7 if name in ("pendulum", "robertson") else 1e-11
    for losses, gradients, sizes in found.values():
        assert torch.equal(sizes, first_sizes)
        assert distance(losses, first_losses) <= near
        assert distance(flat(gradients), flat(first_gradients)) <= near


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_a_batch_with_fewer_windows_than_replicas_is_refused_on_all() -> None:
    ranks = MPI.COMM_WORLD.size
    config = plain_semilinear.config("burgers", training={"batch_size": max(ranks - 1, 1)})
    with Mesh(state=1, data=ranks) as mesh:
        if ranks == 1:
            assert build_problem(config, mesh, torch.float64) is not None
            return
        with pytest.raises(ConfigurationError, match=rf"^\[training\] batch_size = {ranks - 1}: must be at least"):
            build_problem(config, mesh, torch.float64)
