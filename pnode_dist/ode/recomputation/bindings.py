"""The bindings of a right-hand side: the names that it reads, and their values at one moment.

The backward pass of a solve evaluates f again. Until then the program may have bound these names to other values: an
attribute, a variable that f closes over, a parameter that `torch.func.functional_call` had replaced, the training mode
of a module. `installed` restores the values of the forward pass while f is evaluated.

Included are parameters, buffers, submodules and attributes of modules; closure cells, defaults and globals of
functions; partial arguments; attributes of plain objects; entries of dictionaries and lists; and everything reached
through them. Not included are values changed in place (arrays, tensors), class attributes, containers of more than
10,000 entries, and variables of functions of other files. The comparison of recomputed steps detects changes of those
(see `pnode_dist.ode.recomputation.guard`).
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import nn

_Space = dict[str, Any] | list[Any]
_MOST_ENTRIES = 10_000
"""Larger containers hold data and not settings. Searching them would take longer than a solve."""
Changes = dict[tuple[int, Any], Any]
"""Values by the number of a namespace and a key in it. Closure cells have negative numbers."""
_VALUES = frozenset((str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, range, slice))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
_CLOSED_PACKAGES = (
    frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "petsc4py", "mpi4py", "h5py", "pnode_dist"}
) - {"__main__", "argparse", "types"}
"""Packages whose objects hold no settings of the program."""


@dataclass(frozen=True)
class Bindings:
    """Namespaces and closure cells, each with its contents at the capture.

    An entry of `spaces` is a namespace, the names in it that count (those of the globals that a function reads; None:
    all), and the contents. `tensors` are all tensors that were reached. `of_buffers` are the numbers of the namespaces
    that hold buffers of modules.
    """

    spaces: tuple[tuple[_Space, frozenset[str] | None, Any], ...]
    cells: tuple[tuple[Any, Any], ...]
    tensors: tuple[torch.Tensor, ...]
    of_buffers: frozenset[int]

    @property
    def buffers(self) -> frozenset[int]:
        """The `id` of each buffer of a module."""
        return frozenset(id(value) for number in self.of_buffers for value in self.spaces[number][2].values())

    @contextmanager
    def installed(self, replaced: Mapping[int, Any] | None = None) -> Iterator[None]:
        """Bind all names to the values of this capture within the context, and restore their bindings after it.

        A value whose `id` is in `replaced` is replaced by that entry. Bindings that f makes meanwhile are undone.
        """
        before = _Contents.of(self)
        wanted = _Contents(tuple(then for _, _, then in self.spaces), tuple(then for _, then in self.cells))
        if replaced:
            wanted = wanted.with_replaced(replaced)
        wanted.install(self)
        try:
            yield
        finally:
            before.install(self)

    def changes(self) -> Changes:
        """Return the names that have other values than at the capture, with these values.

        Buffers are included. Tensors bound to attributes and variables are not: they would keep alive the last results
        of f.
        """
        found: dict[tuple[int, Any], Any] = {}
        for number, (space, names, then) in enumerate(self.spaces):
            now = _copied(space, names)
            if _same(now, then):
                continue
            if isinstance(now, list):
                found[number, None] = now
                continue
            keeps_tensors = number in self.of_buffers
            for key, value in now.items():
                if then.get(key, _EMPTY) is not value and (keeps_tensors or not isinstance(value, torch.Tensor)):
                    found[number, key] = value
        for number, (cell, then) in enumerate(self.cells):
            value = _content(cell)
            if value is not then and not isinstance(value, torch.Tensor):
                found[-1 - number, None] = value
        return found

    def change_to(self, changes: Changes) -> None:
        """Bind the names to the values of `changes`, and all other names to those of the capture."""
        for place in self.changes().keys() - changes.keys():
            self._bind(place, self._captured(place))
        for place, value in changes.items():
            self._bind(place, value)

    def _captured(self, place: tuple[int, Any]) -> Any:
        number, key = place
        if number < 0:
            return self.cells[-1 - number][1]
        contents = self.spaces[number][2]
        return contents if isinstance(contents, list) else contents.get(key, _EMPTY)

    def _bind(self, place: tuple[int, Any], value: Any) -> None:
        number, key = place
        if number < 0:
            _fill(self.cells[-1 - number][0], value)
            return
        space = self.spaces[number][0]
        if isinstance(space, list):
            space[:] = value
        elif value is _EMPTY:
            space.pop(key, None)
        else:
            space[key] = value


@dataclass(frozen=True)
class _Contents:
    """The contents of the namespaces and cells of a `Bindings`, in its order."""

    of_spaces: tuple[Any, ...]
    of_cells: tuple[Any, ...]

    @classmethod
    def of(cls, bindings: Bindings) -> _Contents:
        """Return the present contents."""
        return cls(
            tuple(_copied(space, names) for space, names, _ in bindings.spaces),
            tuple(_content(cell) for cell, _ in bindings.cells),
        )

    def with_replaced(self, replaced: Mapping[int, Any]) -> _Contents:
        """Return the contents with some values replaced, by their identity."""

        def new(value: Any) -> Any:
            return tuple(map(new, value)) if type(value) is tuple else replaced.get(id(value), value)

        def copy(contents: Any) -> Any:
            if isinstance(contents, dict):
                return {key: new(value) for key, value in contents.items()}
            return [new(value) for value in contents]

        return _Contents(tuple(map(copy, self.of_spaces)), tuple(map(new, self.of_cells)))

    def install(self, bindings: Bindings) -> None:
        """Write these contents to the namespaces and cells."""
        for (space, names, _), wanted in zip(bindings.spaces, self.of_spaces, strict=True):
            _put(space, names, wanted)
        for (cell, _), content in zip(bindings.cells, self.of_cells, strict=True):
            if _content(cell) is not content:
                _fill(cell, content)


def bindings_of(*roots: Any) -> Bindings:
    """Capture the names reached from `roots`, such as a right-hand side and its extra arguments, and their values."""
    walk = _Walk()
    walk.through(roots)
    return Bindings(tuple(walk.spaces), tuple(walk.cells), tuple(walk.tensors), frozenset(walk.of_buffers))


class _Walk:
    """A search of everything reached from some objects."""

    def __init__(self) -> None:
        self.spaces: list[tuple[_Space, frozenset[str] | None, Any]] = []
        self.cells: list[tuple[Any, Any]] = []
        self.tensors: list[torch.Tensor] = []
        self.of_buffers: set[int] = set()
        # Holds all objects seen, so that no `id` is reused: each access to a bound method makes a new object.
        self._seen: dict[int, Any] = {}
        self._pending: list[Any] = []

    def through(self, roots: Any) -> None:
        self._pending.extend(reversed(roots))
        while self._pending:
            thing = self._pending.pop()
            if type(thing) in _VALUES or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            self._visit(thing)

    def _visit(self, thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            self.tensors.append(thing)
        elif isinstance(thing, nn.Module):
            self._module(thing)
        elif isinstance(thing, dict | list):
            if len(thing) <= _MOST_ENTRIES:
                self._space(thing)
        elif isinstance(thing, tuple | set | frozenset):
            if len(thing) <= _MOST_ENTRIES:
                self._pending.extend(thing)
        elif isinstance(thing, functools.partial):
            self._pending.extend((thing.func, thing.args, thing.keywords))
        elif isinstance(thing, types.MethodType):
            self._pending.extend((thing.__self__, thing.__func__))
        elif isinstance(thing, types.FunctionType):
            self._function(thing)
        elif _is_open(thing):
            self._space(vars(thing))
            self._pending.extend(_methods_of(type(thing)))

    def _space(self, space: Any) -> None:
        self.spaces.append((space, None, space.copy()))
        self._pending.extend(space.values() if isinstance(space, dict) else space)

    def _module(self, module: nn.Module) -> None:
        attributes = vars(module)
        for space in (attributes, module._parameters, module._buffers, module._modules):
            if space:
                if space is module._buffers:
                    self.of_buffers.add(len(self.spaces))
                self.spaces.append((space, None, space.copy()))
        self._pending.extend(reversed(module._modules.values()))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in self._seen:
                self._seen[id(tensor)] = tensor
                self.tensors.append(tensor)
        self._pending.extend(_methods_of(type(module)))
        own = attributes.keys() - _OF_EVERY_MODULE
        self._pending.extend(attributes[name] for name in own if name not in ("_parameters", "_buffers", "_modules"))

    def _function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                content = _content(cell)
                self.cells.append((cell, content))
                if content is not _EMPTY:
                    self._pending.append(content)
        self._pending.extend((function.__defaults__, function.__kwdefaults__))
        names = _names_read(function.__code__)
        space = function.__globals__
        found = {name: space[name] for name in names if name in space and not _is_code(space[name], space)}
        if found:
            self.spaces.append((space, frozenset(found), found))
            self._pending.extend(found.values())


_EMPTY = object()


def _fill(cell: Any, content: Any) -> None:
    if content is _EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = content


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is_open(thing: Any) -> bool:
    """Return True if an object's attributes may be settings of the program."""
    if isinstance(thing, type | types.ModuleType) or not hasattr(thing, "__dict__"):
        return False
    if getattr(type(thing), "holds_values_of_func", False):
        return True
    return type(thing).__module__.partition(".")[0] not in _CLOSED_PACKAGES


def _is_code(value: Any, space: dict[str, Any]) -> bool:
    """Return True if a global is a module, a class, or a function of another file, which programs do not rebind."""
    if isinstance(value, types.FunctionType):
        return value.__globals__ is not space
    return isinstance(value, type | types.ModuleType | types.BuiltinFunctionType)


_METHODS: weakref.WeakKeyDictionary[type, tuple[types.FunctionType, ...]] = weakref.WeakKeyDictionary()


def _methods_of(kind: type) -> tuple[types.FunctionType, ...]:
    """Return the methods of a class of the program, which may read globals."""
    if kind not in _METHODS:
        _METHODS[kind] = _found_methods_of(kind)
    return _METHODS[kind]


def _found_methods_of(kind: type) -> tuple[types.FunctionType, ...]:
    programs = (base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _CLOSED_PACKAGES)
    return tuple(value for base in programs for value in vars(base).values() if isinstance(value, types.FunctionType))


@functools.lru_cache(maxsize=1024)
def _names_read(code: types.CodeType) -> frozenset[str]:
    """Return the global names and attributes in the code of a function and its inner functions."""
    inside = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*map(_names_read, inside))


def _copied(space: _Space, names: frozenset[str] | None) -> Any:
    if names is None:
        return space.copy()
    assert isinstance(space, dict)
    return {name: space[name] for name in names if name in space}


def _same(space: Any, other: Any) -> bool:
    """Return True if two namespaces hold the same values in the same order."""
    if len(space) != len(other):
        return False
    if isinstance(space, list):
        return all(map(is_, space, other))
    return all(map(is_, space.values(), other.values())) and space.keys() == other.keys()


def _put(space: Any, names: frozenset[str] | None, wanted: Any) -> None:
    """Set the contents of `space`, or of `names` in it, to `wanted`."""
    if names is not None:
        for name in names:
            if name not in wanted:
                space.pop(name, None)
            elif space.get(name, _EMPTY) is not wanted[name]:
                space[name] = wanted[name]
        return
    if _same(space, wanted):
        return
    if isinstance(space, list):
        space[:] = wanted
        return
    for key in [key for key in space if key not in wanted]:
        del space[key]
    for key, value in wanted.items():
        if space.get(key, _EMPTY) is not value:
            space[key] = value
