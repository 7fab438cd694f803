"""The problems that `[problem] type` can name: registered ones, import paths, and files.

Registered problems are entry points of the group `pnode_dist.problems`, those of this package too. So this module
imports no problem, and a package adds its own without an edit here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.config.user_code import user_code
from pnode_dist.errors import ConfigurationError

GROUP = "pnode_dist.problems"
DEFAULT = "field"


@dataclass(frozen=True)
class Registered:
    """A problem that was found: `kind` names it from any directory, `file` is its source, None for this package's."""

    kind: str
    definition: ProblemDefinition
    file: Path | None

    @property
    def name(self) -> str:
        """The registered name, or that of the class."""
        return self.kind.rpartition(":")[2]

    @property
    def sha256(self) -> str | None:
        """The hash of the source file, by which a resumed run notices a changed problem."""
        return None if self.file is None else hashlib.sha256(self.file.read_bytes()).hexdigest()


def installed() -> dict[str, EntryPoint]:
    """The registered problems by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def is_built_in(kind: Any) -> bool:
    """Return True if a kind is registered by this package."""
    entry = installed().get(kind) if isinstance(kind, str) else None
    return entry is not None and entry.module.partition(".")[0] == "pnode_dist"


def resolve(kind: str, directory: Path) -> Registered:
    """The problem that `kind` names; a file is relative to `directory`.

    Raises `ConfigurationError`, one line, for an unknown name, a module that cannot be imported, and for what is not a
    problem.
    """
    if ":" not in kind:
        if kind.endswith(".py") or "/" in kind:
            raise ConfigurationError(f"{kind} must be followed by a colon and a class, such as ./mine.py:MyProblem")
        return _registered(kind)
    place, _, name = kind.rpartition(":")
    if not name.isidentifier():
        raise ConfigurationError(f"{name!r} after the colon must be the name of a class, such as ./mine.py:MyProblem")
    if place.endswith(".py") or "/" in place:
        path = (directory / place).resolve()
        module = _module_of_file(path)
        kind = f"{path}:{name}"
    else:
        module = _module(place)
        path = Path(module.__file__) if module.__file__ else None  # type: ignore[assignment]
    found = _attribute(module, name, place)
    return Registered(kind, definition_of(found, kind), None if _is_own(module) else path)


def _registered(name: str) -> Registered:
    entries = installed()
    if name not in entries:
        known = ", ".join(entries) or "none, as the package is not installed"
        raise ConfigurationError(
            f"unknown problem{_near(name, entries)}: must be one of {known}, or a class such as ./mine.py:MyProblem or "
            "my_package.my_module:MyProblem"
        )
    entry = entries[name]
    module = _module(entry.module)
    found = _attribute(module, entry.attr, entry.module)
    path = Path(module.__file__) if module.__file__ and not _is_own(module) else None
    return Registered(name, definition_of(found, name), path)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _is_own(module: ModuleType) -> bool:
    return module.__name__.partition(".")[0] == "pnode_dist"


def _module(name: str) -> ModuleType:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigurationError(
            f"there is no module {name}: must be installed or on PYTHONPATH, or a file such as ./mine.py:MyProblem"
        )
    with user_code(f"{name} cannot be imported", Path(spec.origin) if spec.origin else None):
        return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, once; modules beside it can be imported from it."""
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ConfigurationError(f"there is no file {path}{_near(path.name, beside)}")
    name = f"pnode_dist_problem_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path}: must be a Python file, with the ending .py")
    module = importlib.util.module_from_spec(spec)
    # Classes look themselves up in their module while they are made.
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        with user_code(f"{path.name} cannot be imported", path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if hasattr(value, "problem_definition")]
        raise ConfigurationError(f"{place} has no {name}{_near(name, classes)}")
    return found


def definition_of(found: Any, kind: str) -> ProblemDefinition:
    """The definition that a class or object is or gives. Raises `ConfigurationError` if it is neither."""
    if isinstance(found, ProblemDefinition):
        return found
    define = getattr(found, "problem_definition", None)
    if define is None:
        raise ConfigurationError(
            f"{kind.rpartition(':')[2]} is not a problem: must be a class derived from pnode_dist.ForecastProblem or "
            "pnode_dist.TrainableProblem"
        )
    definition: ProblemDefinition = define()
    return definition
