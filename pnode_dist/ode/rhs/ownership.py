"""Ownership of the values of f: copy those whose memory other objects can reach.

A value without other references cannot change before it is used. Any other value may be a buffer that f fills again at
its next evaluation, a view of one, an expanded tensor, a NumPy array, or the state itself. The references to a tensor
and to its storage are counted at every evaluation. So any number of buffers, used in any order, is detected.
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any

import torch

from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.system.torch_internals import storage_pointer, storage_references, tensor_references

_saved_names: dict[type, tuple[str, ...]] = {}


def owned(values: Parts) -> Parts:
    """Return the values, with copies of those whose memory other objects can reach.

    The caller must hold the values in this tuple alone. Copies have a graph if gradients are enabled. All values are
    copied where torch does not count the references to a storage.
    """
    if storage_references is None:
        # Nothing tells a value alone from one that others can reach.
        return tuple([value.clone() for value in values])
    shared = 0
    try:
        # An evaluation of a small f takes little longer than a few calls: keep this code inline.
        for value in values:
            if getrefcount(value) > _ALONE or tensor_references(value) != 1:
                shared += 1
                continue
            storage = value.untyped_storage()
            pointer = storage_pointer(storage)
            references = storage_references(pointer) - _OF_ONE_TENSOR
            # Memory that torch did not allocate, such as NumPy's, has owners that are not counted.
            if not storage.resizable() or (references and not _are_of_its_graph(value, pointer, references)):
                shared += 1
    except (RuntimeError, NotImplementedError, TypeError):
        # A kind of tensor without an accessible storage, or with inaccessible saved tensors.
        shared += 1
    if not shared:
        return values
    return tuple([value.clone() for value in values])


def _are_of_its_graph(value: torch.Tensor, storage: int, references: int) -> bool:
    """Return True if `references` to a storage all belong to the value's own graph, through which nothing is written.

    Such references are the tensor that the value is a view of, if it has no others, and the results that the last
    operation has saved for its derivative.
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
    """Return the names of the attributes of a graph node that hold saved tensors, results before operands."""
    names = [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]
    found = tuple(sorted(names, key=lambda name: "result" not in name and "output" not in name))
    _saved_names[kind] = found
    return found


def _base_references(value: Any) -> tuple[int, int]:
    """Count the references to the base of a view: to the Python object, and to the C++ tensor."""
    return getrefcount(value._base), tensor_references(value._base)


def _references(values: Parts) -> int:
    """Count the references to a Python object in `values` alone. The number depends on the interpreter."""
    for value in values:
        return getrefcount(value)
    raise AssertionError


def _tensor_and_storage(value: torch.Tensor) -> int:
    """Count the references to a storage that only a tensor and a Python storage object hold."""
    storage = value.untyped_storage()
    return 0 if storage_references is None else int(storage_references(storage_pointer(storage)))


_ALONE = _references((torch.empty(0),))
_OF_ONE_TENSOR = _tensor_and_storage(torch.empty(1))
_BASE_ALONE = _base_references(torch.empty(1).view(1))
