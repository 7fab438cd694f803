"""The training windows, or other samples, of a replica, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.distributed.sampler import ReplicaSampler
from pnode_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from pnode_dist.config.tables import Config

Start = TypeVar("Start")


def check_replicas(config: Config, mesh: Mesh, count: int, item: str = "window") -> None:
    """Raise `ConfigurationError` if the training windows, or what an `item` is, or those of a batch, are fewer than the
    replicas."""
    size, replicas = config.training.batch_size, mesh.data_replicas
    if count < replicas:
        raise ConfigurationError(f"[mesh] data = {replicas}: must be at most {count}, the training {item}s")
    if size < replicas:
        raise ConfigurationError(
            f"[training] batch_size = {size}: must be at least {replicas}, one {item} for each replica of [mesh] data"
        )


def shared(
    starts: Sequence[Start], config: Config, mesh: Mesh, epoch: int, done: int = 0
) -> Iterator[tuple[Start, ...]]:
    """This replica's share of each batch of an epoch but the first `done`, in the order that the run's seed and the
    epoch fix.

    Of a last batch that has fewer windows than there are replicas, some get none.
    """
    size, seed = config.training.batch_size, config.run.seed
    sampler = ReplicaSampler(len(starts), size, mesh, seed=seed)
    sampler.set_epoch(epoch, done)
    for share in sampler:
        yield tuple(starts[number] for number in share)
