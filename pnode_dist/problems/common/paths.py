"""Files that a configuration names: paths, globs, lists of both, and files inside installed packages."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pnode_dist.errors import ConfigurationError

PACKAGE = "package:"


def resolve_paths(paths: str | Sequence[str]) -> tuple[Path, ...]:
    """Return the paths of the configured files; each entry is a path, a glob, or either behind `package:NAME/`.

    Raises `ConfigurationError` when the package is not installed or an entry names nothing.
    """
    entries = (paths,) if isinstance(paths, str) else tuple(paths)
    return tuple(found for entry in entries for found in _resolved(entry))


def resolve_path(path: str) -> Path:
    """Return the path of a single configured file.

    Raises `ConfigurationError` as `resolve_paths` does, and for a glob of several files.
    """
    found = resolve_paths(path)
    if len(found) > 1:
        raise ConfigurationError(f"[problem] path = {path!r}: names {len(found)} files, must name one")
    return found[0]


def _resolved(path: str) -> tuple[Path, ...]:
    place = Path(path)
    if path.startswith(PACKAGE):
        package, _, inside = path.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(f"[problem] path = {path!r}: the Python package {package} is not installed")
        place = Path(next(iter(spec.submodule_search_locations))) / inside
    if place.exists():
        return (place,)
    if glob.has_magic(str(place)):
        found = tuple(Path(name) for name in sorted(glob.glob(str(place), recursive=True)))
        if not found:
            raise ConfigurationError(f"[problem] path = {path!r}: no file matches it")
        return found
    raise ConfigurationError(f"[problem] path = {path!r}: there is no such file or directory")
