"""The parameters of a right-hand side: the tensors that it depends on besides the state.

Modules name their parameters. Leaves among their other attributes, and in lists there, are found too. A plain function
is searched: its closure, defaults, the attributes of its bound object, partial arguments and the globals it reads,
through containers and nested functions. A check of the autograd graph of an evaluation detects
parameters that the search has missed, so that none is left out silently.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn

from pnode_dist.exchange.compiled import FIRST_TOKEN
from pnode_dist.ode.rhs.separable import Separable
from pnode_dist.ode.rhs.split import SplitFunction

HOW_TO_NAME_IT = "name it with params=(...), or with adjoint_params=(...) of pnode_dist.torchdiffeq.odeint_adjoint"
_CONTAINERS = (dict, list, tuple)
Edge = tuple[Any, int]
_OPAQUE = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


def find_parameters(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    wanted: Callable[[torch.Tensor], bool] = attrgetter("requires_grad"),
) -> tuple[torch.Tensor, ...]:
    """Return the wanted tensors that `func` and its extra arguments hold, each once, in a stable order.

    By default these are the tensors that require a gradient.
    """
    found: dict[int, torch.Tensor] = {}
    for thing in _search([func, *args]):
        for tensor in (*held_tensors(thing), *_unregistered(thing)) if isinstance(thing, nn.Module) else (thing,):
            if wanted(tensor):
                found.setdefault(id(tensor), tensor)
    return tuple(found.values())


def held_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and then the buffers of a module and its submodules, repeated if they are held twice.

    `parameters()` and `buffers()` build a name for each, and take ten times as long.
    """
    modules = _modules_in(module)
    held: list[torch.Tensor | None] = []
    for inside in modules:
        held += inside._parameters.values()
    for inside in modules:
        held += inside._buffers.values()
    return [tensor for tensor in held if tensor is not None]


def _modules_in(module: nn.Module) -> list[nn.Module]:
    """Return a module and its submodules, each once."""
    modules: dict[int, nn.Module] = {}
    pending = [module]
    while pending:
        inside = pending.pop()
        if id(inside) not in modules:
            modules[id(inside)] = inside
            pending.extend(child for child in reversed(inside._modules.values()) if child is not None)
    return list(modules.values())


def find_modules(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[nn.Module, ...]:
    """Return the modules that `func` and its extra arguments hold, without submodules."""
    return tuple(thing for thing in _search([func, *args]) if isinstance(thing, nn.Module))


def _search(roots: Iterable[Any]) -> Iterator[torch.Tensor | nn.Module]:
    # Holds the objects themselves, so that no `id` of a temporary object is reused.
    seen: dict[int, Any] = {}
    pending = list(roots)[::-1]
    while pending:
        thing = pending.pop()
        if isinstance(thing, _OPAQUE) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, nn.Module):
            yield thing
            if isinstance(thing, SplitFunction):
                pending.extend((thing.explicit, thing.implicit))
            elif isinstance(thing, Separable):
                pending.extend((thing.momentum, thing.position))
        else:
            pending.extend(reversed(list(_inside(thing))))


def _unregistered(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the leaves that are plain attributes of a module or of its submodules, or that a list there holds.

    An intermediate result there can be left over from an earlier evaluation, whose graph is freed.
    """
    for inside in _modules_in(module):
        for name, value in vars(inside).items():
            if isinstance(value, torch.Tensor):
                yield from _leaves((value,))
            # Private containers are those of torch: its hooks, and what it has registered.
            elif type(value) in _CONTAINERS and value and not name.startswith("_"):
                things = value.values() if isinstance(value, dict) else value
                # A list of other things, such as samples, may be long.
                if isinstance(next(iter(things)), torch.Tensor | nn.Module):
                    yield from _leaves(things)


def _leaves(things: Iterable[Any]) -> Iterator[torch.Tensor]:
    for thing in things:
        if isinstance(thing, nn.Module):
            yield from held_tensors(thing)
        elif isinstance(thing, torch.Tensor) and thing.is_leaf:
            yield thing


def _inside(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
        code = getattr(thing.__func__, "__code__", None)
        attributes = getattr(thing.__self__, "__dict__", {})
        if code is not None and not isinstance(thing.__self__, nn.Module):
            yield from (attributes[name] for name in code.co_names if name in attributes)
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


@dataclass(frozen=True)
class Parameters:
    """The tensors that a right-hand side is differentiated with respect to.

    `tensors` do not depend on one another: each has its own partial derivative. `shares_graph`: all evaluations share a
    part of their graph that was made before the solve. The first backward pass must not free it.
    """

    tensors: tuple[torch.Tensor, ...]
    shares_graph: bool


def real_numbers(parameter: torch.Tensor) -> int:
    """Return the number of real numbers in a parameter, two for each complex one."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def independent(tensors: Iterable[torch.Tensor]) -> Parameters:
    """Replace intermediate results that were computed from other parameters by their leaves.

    Otherwise the path through such a result would count twice: for the result and for its origin.
    """
    tensors = tuple({id(tensor): tensor for tensor in tensors}.values())
    results = [tensor for tensor in tensors if tensor.grad_fn is not None]
    leaves = {id(tensor) for tensor in tensors if tensor.grad_fn is None}
    # Several results may be outputs of one node, such as the parts that `chunk` returns.
    nodes = {result.grad_fn for result in results}
    for result in results:
        origins, through = _upstream(result.grad_fn)
        if through & nodes - {result.grad_fn} or origins.keys() & leaves:
            return Parameters(tuple(_leaves_of(tensors).values()), shares_graph=True)
    return Parameters(tensors, shares_graph=False)


def _leaves_of(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        found.update({id(tensor): tensor} if tensor.grad_fn is None else _upstream(tensor.grad_fn)[0])
    return found


def _upstream(start: Any) -> tuple[dict[int, torch.Tensor], set[Any]]:
    """Return the leaf tensors that a node of the autograd graph depends on, and the nodes in between."""
    seen: set[Any] = set()
    leaves = {id(leaf): leaf for leaf in _leaves_above([(start, 0)], frozenset(), seen)}
    return leaves, seen


def _leaves_above(starts: Iterable[Edge], boundary: Set[Edge], seen: set[Any]) -> Iterator[torch.Tensor]:
    """Yield the leaves of the autograd graph above `starts`: nodes with the number of one of their outputs.

    Stops at outputs in `boundary` and at nodes in `seen`, and adds the nodes visited to `seen`.
    """
    pending = list(starts)
    while pending:
        edge = pending.pop()
        node = edge[0]
        if node in seen or edge in boundary:
            continue
        seen.add(node)
        parents = node.next_functions
        if parents:
            pending.extend([parent for parent in parents if parent[0] is not None and parent[0] not in seen])
        else:
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                yield leaf


class Check(Protocol):
    """A check of one evaluation of the function `name`, see `completeness_check`."""

    def __call__(self, outputs: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor], name: str = "func") -> None:
        """Raise `ValueError` for a parameter that was missed."""
        ...


def completeness_check(parameters: Parameters) -> Check:
    """Return a check of one evaluation: `check(outputs, inputs)` raises `ValueError` for a missed parameter.

    It walks the autograd graph of the evaluation to the inputs and the parameters. Any other leaf is a tensor that the
    search has missed.
    """
    # Compiled exchanges depend on their first token, whose gradient is 0.
    known = {id(FIRST_TOKEN), *(id(tensor) for tensor in parameters.tensors)}
    boundary = {(tensor.grad_fn, tensor.output_nr) for tensor in parameters.tensors if tensor.grad_fn is not None}

    def check(outputs: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor], name: str = "func") -> None:
        expected = known.union(id(tensor) for tensor in inputs)
        edges = [(output.grad_fn, output.output_nr) for output in outputs if output.grad_fn is not None]
        direct = [output for output in outputs if output.grad_fn is None and output.requires_grad]
        for leaf in (*direct, *_leaves_above(edges, boundary, set())):
            if id(leaf) not in expected:
                _refuse(leaf, name)

    return check


def _refuse(leaf: torch.Tensor, name: str) -> None:
    raise ValueError(
        f"{name} depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and was not found among its "
        f"parameters: {HOW_TO_NAME_IT}"
    )
