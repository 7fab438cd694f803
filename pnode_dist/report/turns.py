"""Writing one file from many ranks without parallel HDF5: rank 0 creates it, then each rank writes its part in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.protocol import Partition

Writers = Literal["world", "state"]
"""The ranks that write a file: all ranks one file, or the state ranks of each replica a file of their own."""


def in_turn(
    create: Callable[[], None],
    write_part: Callable[[], None],
    partition: Partition | None,
    mesh: Mesh,
    over: Writers = "world",
) -> None:
    """Call `create` on the first rank of `over`, then `write_part` on its state ranks in turn. Collective on `over`.

    Of the world the first replica writes the parts. Without a partition there are no parts to write. A
    `ConfigurationError` of any rank is raised on all ranks of `over`.
    """
    first = mesh.is_root if over == "world" else mesh.state_rank == 0
    agreed(mesh, lambda: create() if first else None, over)
    if partition is None:
        return
    for turn in range(partition.comm.size):
        mine = partition.comm.rank == turn and (over == "state" or mesh.replica == 0)
        agreed(mesh, lambda mine=mine: write_part() if mine else None, over)  # type: ignore[misc]


def write_failure(path: Path, error: OSError) -> ConfigurationError:
    """Return the error to raise for a file that cannot be written."""
    return ConfigurationError(f"{path}: cannot be written: {error.strerror or error}")
