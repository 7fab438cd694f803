"""Ensembles of trajectories and their windows on one rank."""

import numpy as np
import pytest
import torch

from pnode_dist import BatchPartition, Mesh
from pnode_dist.problems.common.ensemble import mean_share, means, spread, windows

TIMES, TRAJECTORIES, COMPONENTS = 7, 4, 3
WHOLE = np.random.default_rng(0).normal(size=(TIMES, TRAJECTORIES, COMPONENTS))


def test_a_window_holds_the_samples_of_all_trajectories_from_its_start_on(mesh: Mesh) -> None:
    ensemble = spread(WHOLE, BatchPartition(mesh, TRAJECTORIES, (COMPONENTS,)))
    assert ensemble.times == TIMES
    found = windows(ensemble, (3, 0), 2, torch.float32)
    assert found.starts == (3, 0)
    assert found.initial.dtype == found.targets.dtype == torch.float32
    whole = torch.from_numpy(WHOLE).float()
    assert torch.equal(found.initial, torch.stack([whole[3], whole[0]]))
    assert torch.equal(found.targets, torch.stack([whole[[4, 1]], whole[[5, 2]]]))


def test_means_are_over_trajectories_and_components(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, TRAJECTORIES, (COMPONENTS,))
    values = torch.from_numpy(WHOLE)
    np.testing.assert_allclose(means(values, partition, mesh), WHOLE.mean(axis=(1, 2)), rtol=1e-13)
    assert mean_share(values[None], partition, mesh).item() == pytest.approx(WHOLE.mean(), rel=1e-12)
