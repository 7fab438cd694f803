"""Windows of trajectories, and the order in which an epoch has them."""

from dataclasses import dataclass
from typing import Any, cast

import torch

from pnode_dist import Mesh
from pnode_dist.problems.trajectories import Trajectories, batches, windows


@dataclass
class Replica:
    """What `batches` asks of a mesh."""

    replica: int
    data_replicas: int


def data() -> Trajectories:
    return Trajectories(torch.randn(3, 6, 1, 4, 1, dtype=torch.float64), 2.0, training=2, interval=0.5)


def order(size: int, seed: int, epoch: int, replica: int = 0, replicas: int = 1) -> list[Any]:
    return list(batches(data().starts(2), size, seed, epoch, cast(Mesh, Replica(replica, replicas))))


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


def test_an_epoch_has_every_start_once_in_batches() -> None:
    found = order(3, seed=0, epoch=1)
    assert [len(batch) for batch in found] == [3, 3, 2]
    assert sorted(start for batch in found for start in batch) == data().starts(2)


def test_the_order_depends_on_seed_and_epoch() -> None:
    assert order(3, 0, 1) == order(3, 0, 1)
    assert order(3, 0, 1) != order(3, 0, 2)
    assert order(3, 0, 1) != order(3, 1, 1)


def test_replicas_share_the_starts_evenly() -> None:
    own = [[start for batch in order(2, 0, 1, replica, 3) for start in batch] for replica in range(3)]
    assert [len(starts) for starts in own] == [2, 2, 2]
    assert len({start for starts in own for start in starts}) == 6
