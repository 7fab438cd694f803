"""Solves inside code that torch.compile compiles: the solve itself stays outside the compiled graph.

PETSc's steps cannot be traced. The graph breaks before the solve and continues after it. f is compiled by
`NeuralODE(compile=True)`, or if it is itself a compiled module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from pnode_dist.system.torch_internals import compiler_is_loaded, mark_as_not_traced
from pnode_dist.system.torch_releases import known_options

P = ParamSpec("P")
R = TypeVar("R")
_REASON = (
    "PETSc takes the steps of pnode_dist's solves, which no graph can hold: leave fullgraph=True away, and give "
    "NeuralODE(compile=True) to compile the right-hand side"
)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude `function`, and all that it calls, from tracing by torch.compile.

    torch.compiler.disable loads torch's compiler, which takes seconds. It is therefore applied only after other code
    has loaded the compiler.
    """
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not compiler_is_loaded():
            return function(*args, **kwargs)
        if not disabled:
            # torch 2.6 names another reason in the error of fullgraph=True.
            reason = known_options(torch.compiler.disable, reason=_REASON)
            disabled.append(torch.compiler.disable(function, **reason))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    # The call breaks the graph.
    mark_as_not_traced(called, _REASON)
    return called
