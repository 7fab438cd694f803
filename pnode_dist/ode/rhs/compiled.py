"""Compilation of a right-hand side and its products with vectors by torch.compile."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, TypeVar

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.automatic_compilation import AutomaticCompilation
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.system.torch_internals import backend_of, configure_compiler, find_cpp_compiler

_log = logging.getLogger(__name__)
_Made = TypeVar("_Made")


class Compiler:
    """Compiler of right-hand sides, by a backend of torch.compile. Compiles each one once.

    `automatic` decides whether a solve is compiled, for solves with a gradient (True) and without; empty: each one is.
    Exchanges between ranks are part of the compiled code. Code that cannot be compiled runs
    uncompiled, and torch's log reports it. Without a C++ compiler nothing is compiled, with a warning. Raises
    `ConfigurationError` for an unknown backend.
    """

    def __init__(self, backend: str, automatic: bool = False) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigurationError(f"compile = {backend!r}: must be True, False, 'auto' or one of {', '.join(known)}")
        configure_compiler()
        self._backend = backend
        self.automatic = {records: AutomaticCompilation() for records in (False, True)} if automatic else {}
        self._works = backend != "inductor" or _has_cpp_compiler()
        # The values hold the functions, so that their `id` is not reused.
        self._made: dict[int, tuple[Function, Any]] = {}
        self._segments: dict[Hashable, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type[Compiler], tuple[str, bool]]:
        # Copies and pickles of a module compile again.
        return Compiler, (self._backend, bool(self.automatic))

    @property
    def name(self) -> str:
        """The backend, or "auto"."""
        return "auto" if self.automatic else self._backend

    def once(self, key: Hashable, held: Any, make: Callable[[], _Made]) -> _Made | None:
        """Return what `make` returned at the first call with this key; None without a C++ compiler.

        `held` are the objects whose identities the key names.
        """
        if not self._works:
            return None
        if key not in self._segments:
            self._segments[key] = (held, make())
        found: _Made = self._segments[key][1]
        return found

    def compile(
        self, function: Callable[..., Any], device: torch.device, transform: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        """Compile a whole function. The result raises at its first call if that is not possible.

        `transform` changes the backend of torch.compile, which gets the graph. The function gets code of its own,
        because torch limits the number of compilations of one piece of code.
        """
        code = function.__code__
        own = FunctionType(
            code.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        # The calls of kernels are C++ too, or are captured once.
        options = {"cpp_wrapper": True} if device.type == "cpu" else {"triton.cudagraphs": True}
        backend = transform(backend_of(self._backend, options, _DECOMPOSITIONS))
        made: Callable[..., Any] = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
        return made

    def compiled(self, func: Function, method: Method, newton: str = "petsc") -> dict[int, Function]:
        """Return the compiled functions of the parts of `func`, by the identity of the part.

        With PETSc's Newton method (`newton`) a part that the method treats implicitly is not compiled: products with
        its Jacobian are derivatives of vector-Jacobian products, which compiled code lacks. Raises
        `ConfigurationError` if no part is left.
        """
        parts: tuple[Function, ...] = (func,)
        if method.family == "arkimex" and isinstance(func, SplitFunction):
            parts = (func.implicit, func.explicit)
        if method.implicit and newton == "petsc":
            if len(parts) == 1:
                raise ConfigurationError(
                    f"compile: method = {method.name!r} treats all of f implicitly, which takes second derivatives "
                    "with newton = 'petsc', and compiled code has none: must be False"
                )
            parts = parts[1:]
        if not self._works:
            return {}
        for part in parts:
            if id(part) not in self._made:
                self._made[id(part)] = (part, torch.compile(part, backend=self._backend, dynamic=False))
        return {id(part): self._made[id(part)][1] for part in parts}


def _tanh(x: torch.Tensor) -> Any:
    """Return tanh(x), which takes half the time of torch's own on a CPU, and is as accurate.

    By the exponential function, and for small x by the continued fraction of Lambert, cut after seven terms.
    """
    if x.dtype not in (torch.float32, torch.float64):
        return NotImplemented
    size, square = x.abs(), x * x
    power = torch.exp(-2 * size)
    small = size < 0.4
    above = x * (((square + 378) * square + 17325) * square + 135135)
    below = ((28 * square + 3150) * square + 62370) * square + 135135
    return torch.where(small, above, torch.sign(x) * (1 - power)) / torch.where(small, below, 1 + power)


def _select_copy(x: torch.Tensor, axis: int, index: int) -> torch.Tensor:
    """Return x[..., index, ...] along an axis: a loop over steps calls torch's own outside of the compiled code."""
    return torch.select(x, axis, index).clone()


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.tanh.default: _tanh,
    torch.ops.aten.select_copy.int: _select_copy,
}


def _has_cpp_compiler() -> bool:
    try:
        find_cpp_compiler()
    except Exception as error:
        warnings.warn(f"compile: no C++ compiler was found, f is run as it is ({error})", RuntimeWarning, stacklevel=4)
        return False
    return True
