"""A device besides the CPU, for tests: its tensors hide CPU tensors, and refuse to be mixed with those.

torch takes it for an accelerator of its own (the key PrivateUse1). What a real one has beyond that, memory of its own
and kernels that run while Python goes on, is not there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.utils import _pytree, backend_registration

# torch 2.6 registers only devices that are written in C++.
_setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
needs_other_device = pytest.mark.skipif(
    _setup is None, reason=f"torch {torch.__version__} registers only devices that are written in C++"
)
_NAME = "elsewhere"
_MOVES = {"copy_", "_foreach_copy_", "_to_copy"}
_AT_ONCE = {torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default}
transfers = {"there": 0, "back": 0}


class Hidden(torch.Tensor):
    """A tensor on the device; `inside` has its values."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Hidden:
        made: Hidden = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=torch.device(_NAME, 0),
        )
        made.inside = inside
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Hidden({self.inside!r})"

    # Functions that torch gives to its own devices alone.
    def tolist(self) -> Any:
        return self.inside.tolist()

    def new_tensor(self, data: Any, **_: Any) -> Hidden:
        return Hidden(self.inside.new_tensor(data))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [value for value in _pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if name not in _MOVES and any(not isinstance(value, Hidden) and value.dim() > 0 for value in given):
            raise RuntimeError(f"{name}: tensors of the CPU and of {_NAME} in one operation")
        device = kwargs.get("device")
        stays = device is None or torch.device(device).type == _NAME
        if device is not None:
            kwargs["device"] = "cpu"
        # Operations on what is inside do not look for the mark of a lazy conjugate.
        func = _AT_ONCE.get(func, func)
        result = func(*_bare(args), **_bare(kwargs))
        if name == "copy_":
            target, source = args[:2]
            if isinstance(target, Hidden) != isinstance(source, Hidden):
                transfers["there" if isinstance(target, Hidden) else "back"] += 1
            return target
        if name == "_to_copy" and not stays:
            transfers["back"] += 1
        if not stays:
            return result
        # What is changed in place stays the same object.
        if name.endswith("_") and not name.startswith("_"):
            return args[0]
        return _pytree.tree_map_only(torch.Tensor, Hidden, result)


def _bare(values: Any) -> Any:
    return _pytree.tree_map_only(Hidden, lambda value: value.inside, values)


@cache
def other_device() -> torch.device:
    """The device, registered with torch on the first call."""
    assert _setup is not None
    _setup(_NAME)
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
        return Hidden(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
        return Hidden(torch.empty_strided(size, stride, dtype=dtype))

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    other_device.library = library  # type: ignore[attr-defined]
    return torch.device(_NAME, 0)
