"""Ensembles of trajectories and their windows on one rank."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pnode_dist import BatchPartition, Mesh
from pnode_dist.problems.ensemble import mean_share, means, shuffled_starts, spread, windows

TIMES, TRAJECTORIES, COMPONENTS = 7, 4, 3
WHOLE = np.random.default_rng(0).normal(size=(TIMES, TRAJECTORIES, COMPONENTS))


def replica(number: int, of: int) -> Any:
    """What the order of the starts is asked of a mesh."""
    return SimpleNamespace(replica=number, data_replicas=of)


def test_a_window_holds_the_samples_of_all_trajectories_from_its_start_on(mesh: Mesh) -> None:
    ensemble = spread(WHOLE, BatchPartition(mesh, TRAJECTORIES, (COMPONENTS,)))
    assert ensemble.times == TIMES
    found = windows(ensemble, (3, 0), 2, torch.float32)
    assert found.starts == (3, 0)
    assert found.initial.dtype == found.targets.dtype == torch.float32
    whole = torch.from_numpy(WHOLE).float()
    assert torch.equal(found.initial, torch.stack([whole[3], whole[0]]))
    assert torch.equal(found.targets, torch.stack([whole[[4, 1]], whole[[5, 2]]]))


def test_an_epoch_has_every_start_once_in_an_order_of_its_own() -> None:
    epochs = [list(shuffled_starts(10, 4, replica(0, 1), 0, epoch)) for epoch in (1, 2)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(start for batch in batches for start in batch) == list(range(10))
    assert epochs[0] != epochs[1]
    assert epochs[0] == list(shuffled_starts(10, 4, replica(0, 1), 0, 1))
    assert epochs[0] != list(shuffled_starts(10, 4, replica(0, 1), 1, 1))


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_have_different_starts_and_as_many(replicas: int) -> None:
    shares = [list(shuffled_starts(10, 4, replica(number, replicas), 0, 1)) for number in range(replicas)]
    used = [start for batches in shares for batch in batches for start in batch]
    assert len(used) == len(set(used)) == 10 // replicas * replicas
    assert len({tuple(len(batch) for batch in batches) for batches in shares}) == 1


def test_means_are_over_trajectories_and_components(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, TRAJECTORIES, (COMPONENTS,))
    values = torch.from_numpy(WHOLE)
    np.testing.assert_allclose(means(values, partition, mesh), WHOLE.mean(axis=(1, 2)), rtol=1e-13)
    assert mean_share(values[None], partition).item() == pytest.approx(WHOLE.mean(), rel=1e-12)
