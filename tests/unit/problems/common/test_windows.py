"""Windows of trajectories, and means of their errors, on one rank."""

import numpy as np
import pytest
import torch

from pnode_dist import BatchPartition, Mesh
from pnode_dist.problems.common.forecast_data import Samples, windows
from pnode_dist.problems.common.forecast_errors import LeadMeans, mean_share

TRAJECTORIES, TIMES, ENTRIES = 3, 6, 4
WHOLE = torch.from_numpy(np.random.default_rng(0).normal(size=(TRAJECTORIES, TIMES, ENTRIES, 1)))


def samples(mesh: Mesh) -> Samples:
    return Samples(BatchPartition(mesh, ENTRIES, (1,)), WHOLE, 0.5 * torch.arange(TIMES, dtype=torch.float64))


def test_windows_start_where_they_fit_into_trajectories(mesh: Mesh) -> None:
    assert samples(mesh).trajectories(0, 2).starts(4) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_window_holds_the_samples_from_its_start_on(mesh: Mesh) -> None:
    found = windows(samples(mesh), [(0, 1), (2, 3)], 2, torch.float32)
    assert found.initial.dtype == found.targets.dtype == torch.float32
    for number, (which, first) in enumerate(found.starts):
        values = WHOLE[which].float()
        assert torch.equal(found.initial[number], values[first])
        assert torch.equal(found.targets[:, number], values[first + 1 : first + 3])
    assert found.times == ((0.5, 1.0, 1.5), (1.5, 2.0, 2.5))


def test_means_are_over_windows_and_all_entries(mesh: Mesh) -> None:
    batch = windows(samples(mesh), [(0, 0), (1, 2)], 3, torch.float64)
    means = LeadMeans(batch)
    for lead in (3, 1, 2):
        for number in range(len(batch.starts)):
            means.add(lead, [number], batch.target(lead)[number : number + 1])
    np.testing.assert_allclose(means.result(mesh), batch.targets.mean(dim=(1, 2, 3)), rtol=1e-13)
    assert mean_share(batch.targets, batch, mesh).item() == pytest.approx(batch.targets.mean().item(), rel=1e-12)
