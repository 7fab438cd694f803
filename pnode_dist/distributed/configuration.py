"""Errors of one rank, raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from pnode_dist.distributed.mesh import Extent, Mesh
from pnode_dist.errors import ConfigurationError

Result = TypeVar("Result")


def agreed(mesh: Mesh, action: Callable[[], Result], over: Extent = "world") -> Result:
    """Run `action` on every rank of `over`. Raises a `ConfigurationError` of any rank on all. Collective on `over`."""
    result: Result | None = None
    failure: ConfigurationError | None = None
    try:
        result = action()
    except ConfigurationError as error:
        failure = error
    first = int(mesh.max(torch.tensor([0 if failure is None else mesh.size - mesh.rank]), over).item())
    if first:
        raise ConfigurationError(mesh.broadcast_object(str(failure), source=mesh.size - first, over=over))
    return result  # type: ignore[return-value]
