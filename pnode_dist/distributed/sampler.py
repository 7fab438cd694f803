"""The samples of a data set for each replica: shares of the batches of one seeded permutation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError


class ReplicaSampler(Sampler[list[int]]):
    """Batches of a seeded permutation of `samples` samples, of which it yields this replica's share, lists of indices.

    For torch's DataLoader it is a `batch_sampler`, or with `batch_size=None` a `sampler` of data sets that take a list.
    `batch_size` counts the samples of all replicas together, and (seed, epoch) alone fix the order: the batches are the
    same however the ranks are split into state ranks and replicas. The ranks that hold one state get the same indices.
    Nothing is repeated to fill up: shares differ by at most one sample, and may be empty where a batch has fewer
    samples than there are replicas; `pnode_dist.distributed.gradients.share_of_mean` weights them rightly. All replicas
    get as many batches. The last one of an epoch may be smaller, or with `drop_last` is left out.

    `shuffle=False` keeps the order of the data set. Not collective.
    Raises `ConfigurationError` when `samples` or `batch_size` is below 1.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        mesh: Mesh,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        for name, value in (("samples", samples), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigurationError(f"{name} = {value}: must be at least 1")
        self._plan = {
            "samples": samples,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }
        self._replica, self._replicas = mesh.replica, mesh.data_replicas
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int, batches_done: int = 0) -> None:
        """Set the epoch, and skip its first `batches_done` batches in the next iteration."""
        self._epoch = epoch
        self._begin = self._handed_out = batches_done

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        samples, size = self._plan["samples"], self._plan["batch_size"]
        return samples // size if self._plan["drop_last"] else -(-samples // size)

    def __iter__(self) -> Iterator[list[int]]:
        samples, size = self._plan["samples"], self._plan["batch_size"]
        order = np.arange(samples)
        if self._plan["shuffle"]:
            order = np.random.default_rng([self._plan["seed"], self._epoch]).permutation(samples)
        begin, self._begin = self._begin, 0
        for number in range(begin, len(self)):
            self._handed_out = number + 1
            yield order[number * size : (number + 1) * size][self._replica :: self._replicas].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of its batches that were yielded. It can be loaded on any mesh.

        Worker processes of a DataLoader fetch batches ahead of their use. With them, count the batches that were used
        and resume with `set_epoch(epoch, batches_done)`.
        """
        return {**self._plan, "epoch": self._epoch, "batches_done": self._handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the last batch of `state`. Raises `ConfigurationError` if the state is of another sampler."""
        for name, value in self._plan.items():
            if state[name] != value:
                raise ConfigurationError(f"the sampler's {name} = {value!r}: must be {state[name]!r}, as in its state")
        self.set_epoch(state["epoch"], state["batches_done"])
