"""Shares of the batches of a permutation, one for each replica."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pnode_dist.distributed.sampler import ReplicaSampler
from pnode_dist.errors import ConfigurationError


def replica(number: int = 0, of: int = 1) -> Any:
    """What a sampler asks of a mesh."""
    return SimpleNamespace(replica=number, data_replicas=of)


def together(samples: int, size: int, replicas: int, **settings: Any) -> list[set[int]]:
    """The batches of all replicas, of which none has a sample twice."""
    samplers = [ReplicaSampler(samples, size, replica(number, replicas), **settings) for number in range(replicas)]
    batches = []
    for shares in zip(*samplers, strict=True):
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        batches.append({sample for share in shares for sample in share})
        assert len(batches[-1]) == sum(sizes)
    return batches


def test_an_epoch_has_every_sample_once() -> None:
    batches = list(ReplicaSampler(10, 4, replica()))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(sample for batch in batches for sample in batch) == list(range(10))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(**settings: int) -> list[list[int]]:
        return list(ReplicaSampler(10, 4, replica(), **settings))

    assert order() == order(seed=0, epoch=0)
    assert order(epoch=1) != order(epoch=2) != order(seed=1, epoch=2)
    sampler = ReplicaSampler(10, 4, replica())
    sampler.set_epoch(2)
    assert list(sampler) == list(sampler) == order(epoch=2)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("samples", "size"), [(21, 4), (13, 5), (3, 8), (12, 3)])
def test_batches_are_the_same_for_any_number_of_replicas(samples: int, size: int, drop_last: bool) -> None:
    alone = together(samples, size, 1, seed=3, drop_last=drop_last)
    assert len(alone) == (samples // size if drop_last else -(-samples // size))
    for replicas in (2, 3, 4):
        assert together(samples, size, replicas, seed=3, drop_last=drop_last) == alone


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert list(ReplicaSampler(5, 2, replica(), shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_an_epoch_that_was_left_is_gone_on_with_on_another_number_of_replicas() -> None:
    whole = together(21, 4, 1, seed=5, epoch=3)
    sampler = ReplicaSampler(21, 4, replica(1, 2), seed=5, epoch=3)
    begun = iter(sampler)
    next(begun)
    next(begun)
    state = sampler.state_dict()
    shares = []
    for number in range(3):
        resumed = ReplicaSampler(21, 4, replica(number, 3), seed=5)
        resumed.load_state_dict(state)
        shares.append(list(resumed))
        assert len(list(resumed)) == len(whole)  # the next epoch is a whole one
    found = [{sample for share in batch for sample in share} for batch in zip(*shares, strict=True)]
    assert found == whole[2:]


def test_an_epoch_that_is_over_has_nothing_left() -> None:
    sampler = ReplicaSampler(6, 4, replica())
    assert len(list(sampler)) == 2
    other = ReplicaSampler(6, 4, replica())
    other.load_state_dict(sampler.state_dict())
    assert list(other) == []


def test_a_state_of_other_batches_is_refused() -> None:
    sampler = ReplicaSampler(6, 4, replica(), seed=1)
    with pytest.raises(ConfigurationError, match="the sampler's seed = 1: must be 2, as in its state"):
        sampler.load_state_dict(ReplicaSampler(6, 4, replica(), seed=2).state_dict())


@pytest.mark.parametrize(("samples", "size", "name"), [(0, 2, "samples"), (2, 0, "batch_size")])
def test_nothing_to_sample_is_refused(samples: int, size: int, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} = 0: must be at least 1"):
        ReplicaSampler(samples, size, replica())


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_s_loader_takes_it_either_way(workers: int) -> None:
    data = TensorDataset(torch.arange(10.0))
    sampler = ReplicaSampler(10, 4, replica(1, 2))
    wanted = [torch.tensor(share, dtype=torch.float32) for share in sampler]
    for settings in ({"batch_sampler": sampler}, {"sampler": sampler, "batch_size": None}):
        loader = DataLoader(data, num_workers=workers, **settings)  # type: ignore[arg-type]
        assert len(loader) == 3
        assert all(torch.equal(found, share) for (found,), share in zip(loader, wanted, strict=True))
