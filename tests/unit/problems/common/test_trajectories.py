"""Windows of trajectories."""

import torch

from pnode_dist.problems.common.trajectories import Trajectories, windows


def data() -> Trajectories:
    return Trajectories(torch.randn(3, 6, 1, 4, 1, dtype=torch.float64), 2.0, training=2, interval=0.5)


def test_windows_start_where_they_fit_into_trajectories_to_learn_from() -> None:
    assert data().starts(4) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_window_holds_the_samples_from_its_start_on() -> None:
    whole = data()
    found = windows(whole, [(0, 1), (2, 3)], 2, torch.float32)
    assert found.initial.dtype == found.targets.dtype == torch.float32
    for number, (which, first) in enumerate(found.starts):
        values = whole.values[which].float()
        assert torch.equal(found.initial[number], values[first])
        assert torch.equal(found.targets[:, number], values[first + 1 : first + 3])
    assert found.times == [0.0, 0.5, 1.0]
