"""The partition of one vector, for states whose entries are all coupled."""

from __future__ import annotations

from mpi4py import MPI

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.batch import BatchPartition


class DensePartition(BatchPartition):
    """A vector of `size` entries, consecutive ones on each rank. Collective on the state ranks.

    The split may be uneven, and a rank may own nothing when there are fewer entries than ranks. Local states are
    `[..., local_size]` with any number of leading batch axes. `global_shape` is `(size,)`, `local_shape` this rank's
    part of it, `owned` its range of entries. Raises `ConfigurationError` for a size below 1.
    """

    def __init__(self, mesh: Mesh | MPI.Comm, size: int) -> None:
        if size < 1:
            raise ConfigurationError(f"size = {size}: must be at least 1")
        super().__init__(mesh, size, ())
        self.size = size

    @property
    def counts(self) -> list[int]:
        """The number of entries of each rank."""
        return [stop - start for start, stop in self._ranges]
