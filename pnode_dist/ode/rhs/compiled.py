"""Compilation of a right-hand side and its products with vectors by torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.system.torch_internals import configure_compiler, find_cpp_compiler


class Compiler:
    """Compiler of right-hand sides, by a backend of torch.compile. Compiles each one once.

    Exchanges between ranks are part of the compiled code. Code that cannot be compiled runs
    uncompiled, and torch's log reports it. Without a C++ compiler nothing is compiled, with a warning. Raises
    `ConfigurationError` for an unknown backend.
    """

    def __init__(self, backend: str) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigurationError(f"compile = {backend!r}: must be True, False or one of {', '.join(known)}")
        configure_compiler()
        self._backend = backend
        self._works = backend != "inductor" or _has_cpp_compiler()
        # The values hold the functions, so that their `id` is not reused.
        self._made: dict[int, tuple[Function, Any]] = {}

    def __reduce__(self) -> tuple[type[Compiler], tuple[str]]:
        # Copies and pickles of a module compile again.
        return Compiler, (self._backend,)

    def compiled(self, func: Function, method: Method) -> dict[int, Function]:
        """Return the compiled functions of the parts of `func`, by the identity of the part.

        A part that the method treats implicitly is not compiled: products with its Jacobian are derivatives of
        vector-Jacobian products, which compiled code lacks. Raises `ConfigurationError` if no part is left.
        """
        parts: tuple[Function, ...] = (func,)
        if method.implicit:
            if method.family != "arkimex" or not isinstance(func, SplitFunction):
                raise ConfigurationError(
                    f"compile: method = {method.name!r} treats all of f implicitly, which takes second derivatives, "
                    "and compiled code has none: must be False"
                )
            parts = (func.explicit,)
        if not self._works:
            return {}
        for part in parts:
            if id(part) not in self._made:
                self._made[id(part)] = (part, torch.compile(part, backend=self._backend, dynamic=False))
        return {id(part): self._made[id(part)][1] for part in parts}


def _has_cpp_compiler() -> bool:
    try:
        find_cpp_compiler()
    except Exception as error:
        warnings.warn(f"compile: no C++ compiler was found, f is run as it is ({error})", RuntimeWarning, stacklevel=4)
        return False
    return True
