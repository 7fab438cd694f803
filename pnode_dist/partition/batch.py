"""The partition of ensembles and mini-batches: whole samples on each rank."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition import protocol
from pnode_dist.petsc import vectors


class BatchPartition:
    """A batch of `samples` samples of shape `sample_shape`. Collective on the state ranks.

    Each rank has consecutive samples. The split may be uneven, and a rank may own nothing when there are fewer samples
    than ranks. `comm` is the communicator, `global_shape` is `(samples, *sample_shape)`, `local_shape` this rank's part
    of it, `owned` its range of sample numbers.
    """

    def __init__(self, mesh: Mesh | MPI.Comm, samples: int, sample_shape: tuple[int, ...]) -> None:
        if samples < 1:
            raise ConfigurationError(f"samples = {samples}: must be at least 1")
        self.comm = protocol.communicator(mesh)
        self._ranges = protocol.even_ranges(samples, self.comm.size)
        self.owned = self._ranges[self.comm.rank]
        self.global_shape = (samples, *sample_shape)
        self.local_shape = (self.owned[1] - self.owned[0], *sample_shape)

    def owned_slices(self, rank: int) -> protocol.Slices:
        """Return the owned range of `rank` in the global array, one slice for each axis."""
        return (slice(*self._ranges[rank]), *(slice(0, extent) for extent in self.global_shape[1:]))

    def create_vec(self) -> PETSc.Vec:
        """Create a zero Vec with the layout of the partition. Collective on the state ranks."""
        return vectors.create_vec(self.comm, protocol.count(self.local_shape))

    def view(self, vec: PETSc.Vec) -> torch.Tensor:
        """Return this rank's part of `vec` as a tensor of `local_shape`, without a copy."""
        return vectors.view(vec, self.local_shape)

    def scatter(self, source: Any, root: int = 0) -> torch.Tensor:
        """Distribute a global array from `root`. Collective on the state ranks. See `protocol.scatter`."""
        return protocol.scatter(source, self, root)

    def gather(self, local: torch.Tensor, root: int = 0) -> torch.Tensor | None:
        """Return all samples on `root`, None elsewhere. Collective on the state ranks."""
        return protocol.gather(local, self, root)
