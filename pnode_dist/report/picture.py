"""Drawing of the report if matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.report.turns import write_failure


def draw(path: Path, drawing: Callable[[Path], None], mesh: Mesh) -> str:
    """Call `drawing(path)` on rank 0. Returns the path, or a note that matplotlib is missing. Collective on the world.

    Raises `ConfigurationError` on all ranks when the file cannot be written.
    """
    said: str = mesh.broadcast_object(agreed(mesh, lambda: render(path, drawing) if mesh.is_root else None))
    return said


def render(path: Path, drawing: Callable[[Path], None]) -> str:
    """Call `drawing(path)` if matplotlib is installed. Returns the path, or a note that it is missing.

    Call on one rank.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "not drawn, as matplotlib is missing: pip install 'pnode-dist[plot]'"
    try:
        drawing(path)
    except OSError as error:
        raise write_failure(path, error) from None
    return str(path)
