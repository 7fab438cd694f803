"""Compilation of a right-hand side and its products with vectors by torch.compile."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.linear_map import keep_out_of_compiled_code
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.system.torch_internals import compiler_errors, configure_compiler, find_cpp_compiler

_log = logging.getLogger(__name__)


class Compiler:
    """Compiler of right-hand sides, by a backend of torch.compile. Compiles each one once.

    Exchanges between ranks are not compiled. They separate the compiled pieces. Code that cannot be compiled runs
    uncompiled, and torch's log reports it. Without a C++ compiler nothing is compiled, with a warning. Raises
    `ConfigurationError` for an unknown backend.
    """

    def __init__(self, backend: str) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigurationError(f"compile = {backend!r}: must be True, False or one of {', '.join(known)}")
        configure_compiler()
        keep_out_of_compiled_code()
        self._backend = backend
        self._works = backend != "inductor" or _has_cpp_compiler()
        # The values hold the functions, so that their `id` is not reused.
        self._made: dict[int, tuple[Function, Any]] = {}
        self._whole: dict[Any, Callable[..., Any]] = {}

    def __reduce__(self) -> tuple[type[Compiler], tuple[str]]:
        # Copies and pickles of a module compile again.
        return Compiler, (self._backend,)

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

    def whole(self, key: Any, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any] | None:
        """Return the method that `make()` returns compiled without breaks, once for each key; None without a compiler.

        The function returns None where it cannot be compiled as a whole, such as code with exchanges. torch's log
        reports it.
        """
        if not self._works:
            return None
        if key not in self._whole:
            compiled = torch.compile(_own_code(make()), backend=self._backend, dynamic=False, fullgraph=True)
            self._whole[key] = _none_if_not_whole(compiled)
        return self._whole[key]


def _own_code(method: Any) -> Callable[..., Any]:
    """Return the method with a code object of its own: torch limits the versions of one code object."""
    function = method.__func__
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return MethodType(own, method.__self__)


def _none_if_not_whole(compiled: Callable[..., Any]) -> Callable[..., Any]:
    errors = compiler_errors()
    works = True

    def called(*args: Any) -> Any:
        nonlocal works
        if not works:
            return None
        try:
            return compiled(*args)
        except errors as error:
            works = False
            _log.warning("compile: Newton's method runs uncompiled: %s", str(error).strip().partition("\n")[0])
            return None

    return called


def _has_cpp_compiler() -> bool:
    try:
        find_cpp_compiler()
    except Exception as error:
        warnings.warn(f"compile: no C++ compiler was found, f is run as it is ({error})", RuntimeWarning, stacklevel=4)
        return False
    return True
