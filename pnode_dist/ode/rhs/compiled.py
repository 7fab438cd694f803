"""A right-hand side, and its products with vectors, through torch.compile."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.linear_map import keep_out_of_compiled_code
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.system.torch_internals import configure_compiler, find_cpp_compiler


class Compiler:
    """Compiles right-hand sides by a backend of torch.compile, each once.

    Exchanges between ranks stay as they are, between the compiled pieces. What a piece cannot be made of is run as it
    is; torch's log says so. Where there is no C++ compiler at all, nothing is compiled, and a warning says that.
    Raises `ConfigurationError` for a backend that torch does not know.
    """

    def __init__(self, backend: str) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigurationError(f"compile = {backend!r}: must be True, False or one of {', '.join(known)}")
        configure_compiler()
        keep_out_of_compiled_code()
        self._backend = backend
        self._works = backend != "inductor" or _has_cpp_compiler()
        # With what they were made of, whose identity they are found by.
        self._made: dict[int, tuple[Function, Any]] = {}

    def __reduce__(self) -> tuple[type[Compiler], tuple[str]]:
        # Copies and pickles of a module compile for themselves.
        return Compiler, (self._backend,)

    def compiled(self, func: Function, method: Method) -> dict[int, Function]:
        """What to call in place of each part of `func`, by its identity.

        A part that the method treats implicitly is left alone: products with its Jacobian are derivatives of
        vector-Jacobian products, which compiled code does not have. Raises `ConfigurationError` if nothing remains.
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
