"""A warning for a solve of a single step that is far too long.

With two times and neither `step_size` nor tolerances a solve takes one step. Users of libraries with adaptive steps may
expect otherwise, and would get numbers that look like a solution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.distributed import agreement
from pnode_dist.distributed.agreement import Description
from pnode_dist.ode.recomputation.bindings import bindings_of
from pnode_dist.ode.recomputation.carried import Carried
from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.solver import Solver

LARGEST_DIFFERENCE = 0.1
_MOST_KINDS = 256
_looked_at: set[Any] = set()


def is_first_of_its_kind(solver: Solver, func: Any) -> bool:
    """Return True for the first solve of one step with this method and kind of right-hand side, on any rank.

    Collective for a new solver, which all ranks make together. Returns False for one that was used before.
    """
    if solver.solves != 1:
        return False
    code = getattr(func, "__code__", None) or type(func)
    kind = (solver.stepper.method.name, code)
    is_first = kind not in _looked_at
    is_first = _on_any_rank(is_first, solver.stepper.comm)
    if len(_looked_at) < _MOST_KINDS:
        _looked_at.add(kind)
    return is_first


def _on_any_rank(flag: bool, comm: MPI.Comm) -> bool:
    """Return True if `flag` is True on any rank. Collective on `comm`, with its deadline."""
    if comm.size == 1:
        return flag
    call = "the comparison of one step with two"
    (least,) = agreement.of(comm).reduced(
        comm,
        agreement.digest(call),
        lambda: Description(call, {}, "", agreement.place_in_program(), None),
        (-int(flag),),
    )
    return least < 0


def finer_end(solve: Callable[[], Parts], func: Any, args: tuple[Any, ...], comm: MPI.Comm) -> Parts | None:
    """Return the last state of the same solve in two steps, run by `solve`; None if f raises an error. Collective.

    All changes that f makes are undone: names, buffers and random states.
    """
    bindings = bindings_of(func, *args)
    buffers = bindings.buffers
    device = next((tensor.device for tensor in bindings.tensors if not tensor.is_cpu), None)
    carried = Carried(bindings, ((tensor, id(tensor) in buffers) for tensor in bindings.tensors), device)
    try:
        with carried.aside(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return solve()
    except Exception:
        # The user did not ask for these evaluations: ignore errors, except where other ranks would wait.
        if comm.size > 1:
            raise
        return None


def warn_if_coarse(what: str, size: float, states: tuple[Parts, Parts, Parts], comm: MPI.Comm) -> None:
    """Warn if the last states of a solve in one step and in two differ by more than `LARGEST_DIFFERENCE`, relatively.

    `states` are the last state of one step, that of two steps, and the first state. Collective on `comm`.
    """
    sums = np.zeros(3)
    for coarse, fine, begin in zip(*states, strict=True):
        parts = (coarse.detach().double() - fine.double(), fine.double(), begin.detach().double())
        sums += [part.square().sum().item() for part in parts]
    if comm.size > 1:
        # Synchronise with a deadline first: another rank's f may have raised an error.
        _on_any_rank(True, comm)
        comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
    difference, scale = math.sqrt(sums[0]), math.sqrt(max(sums[1], sums[2]))
    if math.isfinite(difference) and difference > LARGEST_DIFFERENCE * scale and comm.rank == 0:
        warnings.warn(
            f"{what} is too long: two steps of half the size end {difference / scale:.0%} elsewhere; give step_size=, "
            f"or rtol= and atol= (step_size={size:g} says that one step is meant)",
            RuntimeWarning,
            stacklevel=2,
        )
