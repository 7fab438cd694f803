"""A problem that a configuration can name: its tables, and the function that builds it.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from pnode_dist.config.tables import Config, Table
from pnode_dist.errors import ConfigurationError

_BASES = {"problem": "ProblemTable", "model": "ModelTable"}
Build = Callable[..., Any]
"""`build(config, mesh, dtype)` returns the problem, as `pnode_dist.train.problem.Problem`. Collective on the world."""


@dataclass(frozen=True)
class ProblemDefinition:
    """The configuration that a problem needs, and the function that builds the problem from it.

    `run` describes all tables of the TOML file. `build` is the function itself, or `"module:function"`, which is
    imported when the problem is built. `description` is one line for lists.
    """

    run: type[Config]
    build: Build | str
    description: str = ""

    def builder(self) -> Build:
        """The function that builds the problem, imported now if it was given by name."""
        if not isinstance(self.build, str):
            return self.build
        module, _, name = self.build.partition(":")
        found: Build = getattr(import_module(module), name)
        return found


def run_type(
    name: str,
    problem: type[BaseModel],
    model: type[BaseModel],
    evaluation: type[BaseModel],
    others: Mapping[str, type[BaseModel]] | None = None,
    base: type[Config] = Config,
) -> type[Config]:
    """The configuration whose tables `[problem]`, `[model]`, `[evaluation]` and `others` are these classes.

    A table that has a default for each key may be left out of the file. Raises `ConfigurationError` for a class that is
    not a pydantic model.
    """
    tables = {"problem": problem, "model": model, "evaluation": evaluation, **(others or {})}
    fields: dict[str, Any] = {}
    for table, given in tables.items():
        strict = _strict(name, table, given)
        required = table == "problem" or any(field.is_required() for field in strict.model_fields.values())
        fields[table] = (strict, ...) if required else (strict, Field(default_factory=strict))
    return create_model(f"{name}Run", __base__=base, **fields)


def _strict(name: str, table: str, given: Any) -> type[BaseModel]:
    """The class, refusing unknown keys and changes; `[problem]` also has the key `type`."""
    if not (isinstance(given, type) and issubclass(given, BaseModel)):
        raise ConfigurationError(
            f"{name}: the class for [{table}] is {getattr(given, '__qualname__', repr(given))}: must be a pydantic "
            f"model, such as a subclass of pnode_dist.{_BASES.get(table, 'config.tables.Table')}"
        )
    config = given.model_config
    if config.get("extra") != "forbid" or not config.get("frozen"):
        namespace = {"model_config": ConfigDict(extra="forbid", frozen=True), "__module__": given.__module__}
        strict: type[BaseModel] = type(given.__name__, (given,), {**namespace, "__doc__": given.__doc__})
        given = strict
    if table == "problem" and "type" not in given.model_fields:
        description = ProblemTable.model_fields["type"].description
        doc, module = given.__doc__, given.__module__
        given = create_model(
            given.__name__,
            __base__=given,
            __doc__=doc,
            __module__=module,
            type=(str, Field(description=description)),
        )
    found: type[BaseModel] = given
    return found


class ProblemTable(Table):
    """Base class of a table `[problem]`."""

    type: str
    """The problem: a name from `pnode-dist problems`, an import path `my_package.my_module:MyProblem`, or a file
    `./mine.py:MyProblem`, relative to the configuration."""


class ModelTable(Table):
    """Base class of a table `[model]`."""
