"""Writing one file from many ranks without parallel HDF5: rank 0 creates it, then each rank writes its part in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.protocol import Partition


def in_turn(
    create: Callable[[], None], write_part: Callable[[], None], partition: Partition | None, mesh: Mesh
) -> None:
    """Call `create` on rank 0, then `write_part` on the ranks of the first replica in turn. Collective on the world.

    Without a partition there are no parts to write. A `ConfigurationError` of any rank is raised on all.
    """
    agreed(mesh, lambda: create() if mesh.is_root else None)
    if partition is None:
        return
    for turn in range(partition.comm.size):
        mine = mesh.replica == 0 and partition.comm.rank == turn
        agreed(mesh, lambda mine=mine: write_part() if mine else None)  # type: ignore[misc]


def write_failure(path: Path, error: OSError) -> ConfigurationError:
    """Return the error to raise for a file that cannot be written."""
    return ConfigurationError(f"{path}: cannot be written: {error.strerror or error}")
