"""Memory of what f returned: whether anybody but the caller can still reach it, and copies where somebody can.

A value that nobody else holds cannot change before it is used. Any other one may be a buffer that f fills again at its
next evaluation, a view of one, an expanded tensor, an array of NumPy's, or the state itself. The references to the
tensor and to its storage are counted at every evaluation, so that it does not matter how many buffers f has, nor in
which order it uses them.
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any

import torch

from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.system.torch_internals import storage_pointer, storage_references, tensor_references

_saved_names: dict[type, tuple[str, ...]] = {}


def owned(values: Parts) -> Parts:
    """The values, with copies of those whose memory somebody else can reach.

    The caller holds them in this tuple alone. Copies have a graph where gradients are enabled.
    """
    shared = 0
    try:
        # One evaluation of a small f takes little longer than a few calls: no function for what is common.
        for value in values:
            if getrefcount(value) > _ALONE or tensor_references(value) != 1:
                shared += 1
                continue
            storage = value.untyped_storage()
            pointer = storage_pointer(storage)
            references = storage_references(pointer) - _OF_ONE_TENSOR
            # Memory that torch did not allocate itself, such as NumPy's, has owners that are not counted.
            if not storage.resizable() or (references and not _are_of_its_graph(value, pointer, references)):
                shared += 1
    except (RuntimeError, NotImplementedError, TypeError):
        # A kind of tensor that has no storage to look at, or whose saved values cannot be had.
        shared += 1
    if not shared:
        return values
    return tuple([value.clone() for value in values])


def _are_of_its_graph(value: torch.Tensor, storage: int, references: int) -> bool:
    """Whether so many references to a storage are those of the value's own graph, through which nobody writes.

    These are the tensor that it is a view of, if nobody else holds that, and the results that the operation before it
    has saved for its derivative.
    """
    origin = value
    if value._is_view():
        if _base_references(value) != _BASE_ALONE:
            return False
        origin = value._base  # type: ignore[assignment]
        references -= 1
    node = origin.grad_fn
    if references and node is not None:
        names = _saved_names.get(type(node)) or _names_of(type(node))
        for name in names:
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple) else (saved,):
                references -= isinstance(tensor, torch.Tensor) and storage_pointer(tensor.untyped_storage()) == storage
            if not references:
                break
    return not references


def _names_of(kind: type) -> tuple[str, ...]:
    """The attributes of a node of the graph that hold what it has saved, results before operands."""
    names = [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]
    found = tuple(sorted(names, key=lambda name: "result" not in name and "output" not in name))
    _saved_names[kind] = found
    return found


def _base_references(value: Any) -> tuple[int, int]:
    """The references to the tensor that `value` is a view of: to the Python object, and to what is behind it."""
    return getrefcount(value._base), tensor_references(value._base)


def _references(values: Parts) -> int:
    """The references to a Python object that is in `values` alone, which depend on the interpreter."""
    for value in values:
        return getrefcount(value)
    raise AssertionError


def _tensor_and_storage(value: torch.Tensor) -> int:
    """The references to the storage of a tensor, where it and a Python object of the storage are all there are."""
    storage = value.untyped_storage()
    return int(storage_references(storage_pointer(storage)))


_ALONE = _references((torch.empty(0),))
_OF_ONE_TENSOR = _tensor_and_storage(torch.empty(1))
_BASE_ALONE = _base_references(torch.empty(1).view(1))
