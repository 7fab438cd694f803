"""Which tensors a right-hand side depends on besides the state.

Modules name their parameters. A plain function is searched: what it closes over, its defaults, bound object, partial
arguments and the globals it mentions, through containers and nested functions. Whatever escapes the search is caught
by looking at the autograd graph of an evaluation, so that no parameter is ever left out silently.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

_OPAQUE = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


def find_parameters(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors requiring a gradient that `func` and its extra arguments hold, each once, in a stable order."""
    found: dict[int, torch.Tensor] = {}
    for tensor in _search([func, *args]):
        if tensor.requires_grad:
            found.setdefault(id(tensor), tensor)
    return tuple(found.values())


def _search(roots: Iterable[Any]) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    pending = list(roots)[::-1]
    while pending:
        thing = pending.pop()
        if isinstance(thing, _OPAQUE) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, nn.Module):
            yield from thing.parameters()
            yield from thing.buffers()
        else:
            pending.extend(reversed(list(_inside(thing))))


def _inside(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                continue
        yield thing.__defaults__
        yield thing.__kwdefaults__
        yield from (thing.__globals__[name] for name in thing.__code__.co_names if _is_data(thing, name))
    elif callable(thing) and hasattr(thing, "__dict__"):
        yield from vars(thing).values()


def _is_data(function: types.FunctionType, name: str) -> bool:
    return isinstance(function.__globals__.get(name), torch.Tensor | nn.Module | dict | list | tuple)


def check_complete(outputs: Iterable[torch.Tensor], known: Iterable[torch.Tensor]) -> None:
    """Raise `ValueError` if `outputs` depend on a leaf tensor that is not reached through `known`.

    Walks the autograd graph of one evaluation of the right-hand side, stopping at the `known` tensors.
    """
    leaves = {id(tensor) for tensor in known if tensor.grad_fn is None}
    boundary = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(boundary)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and id(leaf) not in leaves:
            raise ValueError(
                f"func depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and was not found "
                "among its parameters: name it with params=(...)"
            )
        pending.extend(parent for parent, _ in node.next_functions if parent is not None)
