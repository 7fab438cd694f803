"""Newton's method for many small systems at once: one block for each sample, factored in a batch.

All tensors are in PETSc's scalar type: states `[sample, component]`, blocks `[sample, row, column]`.

The factors of the blocks are kept while each iteration reduces the residuals of all samples enough (simplified Newton),
and made anew where one does not. A step that does not reduce the residual of a sample is halved for that sample.
E. Hairer, G. Wanner: Solving Ordinary Differential Equations II, 2nd ed. (1996), section IV.8. C. T. Kelley: Solving
Nonlinear Equations with Newton's Method, SIAM (2003), section 1.6, for the halving.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from mpi4py import MPI

_SLOW = 0.1
"""The factors are made anew if an iteration leaves more than this share of some sample's residual."""
_DECREASE = 1e-4
_SHORTEST = 2.0**-12
_ROUNDING = 64.0


@dataclass(frozen=True)
class NewtonTolerances:
    """The tolerances of PETSc's SNES, applied to each sample: `snes_rtol`, `snes_atol`, `snes_stol`, `snes_max_it`."""

    relative: float
    absolute: float
    step: float
    iterations: int

    @cached_property
    def limits(self) -> torch.Tensor:
        """The three tolerances as a tensor."""
        return torch.tensor([self.relative, self.absolute, self.step], dtype=torch.float64)


class Factors(NamedTuple):
    """The factors of M - reach J for each sample."""

    reach: float
    lu: torch.Tensor
    pivots: torch.Tensor

    def solve(self, sides: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Solve the systems, or the transposed ones, for right sides `[sample, component]`."""
        found: torch.Tensor = torch.linalg.lu_solve(self.lu, self.pivots, sides.unsqueeze(-1), adjoint=transposed)
        return found.squeeze(-1)


def factored(jacobians: torch.Tensor, reach: float, mass: torch.Tensor | None) -> Factors:
    """Factor M - reach J. A singular block yields solutions that are not finite."""
    blocks = jacobians * -reach
    if mass is None:
        blocks.diagonal(dim1=-2, dim2=-1).add_(1.0)
    else:
        blocks += mass
    lu, pivots, _ = torch.linalg.lu_factor_ex(blocks)
    return Factors(reach, lu, pivots)


@dataclass(frozen=True)
class StageEquations:
    """The equations M y - reach g(y) = base of one stage, for each sample. `mass` are the blocks of M, None for 1.

    `value(y)` returns g, and `linearised(y)` returns g with its blocks. Both are collective if g is.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    linearised: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    reach: float
    base: torch.Tensor
    mass: torch.Tensor | None

    def multiplied(self, y: torch.Tensor) -> torch.Tensor:
        """Return M y."""
        return y if self.mass is None else torch.matmul(self.mass, y.unsqueeze(-1)).squeeze(-1)


class Solution(NamedTuple):
    """The result of a solve: the states, the factors last used, and the number of iterations.

    `failure` is the name of PETSc's reason for a solve that has not converged, else None, and `residual` the norm of
    the residual over all samples of this rank then.
    """

    states: torch.Tensor
    factors: Factors | None
    iterations: int
    failure: str | None = None
    residual: float = 0.0


def solve(
    equations: StageEquations,
    guess: torch.Tensor,
    factors: Factors | None,
    tolerances: NewtonTolerances,
    comm: MPI.Comm,
) -> Solution:
    """Solve the equations of all samples from `guess`, beginning with `factors` of other equations if given.

    A sample has converged where its residual is below the tolerances, relative to its first one, or where the next
    change is below `step` of the state. The states of such a sample are not changed until all have converged. Then the
    last change is made, so the result of a sample does not depend on the others unless they need other factors.

    Collective on `comm`: all ranks take the same number of iterations, because g may communicate.
    """
    if factors is not None and factors.reach != equations.reach:
        factors = None
    y, reach = guess, equations.reach
    first = before = change = origin = share = None
    was_fresh = True
    least = tolerances.absolute * abs(reach)
    for iteration in range(tolerances.iterations + 1):
        fresh = factors is None
        if factors is None:
            values, jacobians = equations.linearised(y)
            factors = factored(jacobians, reach, equations.mass)
        else:
            values = equations.value(y)
        multiplied = equations.multiplied(y)
        residual = torch.sub(multiplied, equations.base).sub_(values, alpha=reach)
        norms = _norms(residual)
        update = factors.solve(residual)
        if first is None or before is None:
            first = before = norms
        # The tolerance of an infinite residual is infinite.
        done = torch.isfinite(norms) & (
            (norms <= torch.clamp(first * tolerances.relative, min=least))
            | (_norms(update) <= tolerances.step * _norms(y))
        )
        worst = _worst(done, norms, before, comm)
        if worst >= 1.0 and iteration:
            # Rounding leaves a residual that no iteration reduces.
            scale = _norms(multiplied) + _norms(equations.base) + abs(reach) * _norms(values)
            done = done | (norms <= _ROUNDING * torch.finfo(norms.dtype).eps * scale)
            worst = _worst(done, norms, before, comm)
        if worst == 0.0:
            # A block without an inverse has no update.
            return Solution(y - torch.where(torch.isfinite(update), update, 0.0), factors, iteration)
        if not math.isfinite(worst) and not iteration:
            return _failed(y, iteration, "DIVERGED_FUNCTION_NANORINF", residual)
        if iteration == tolerances.iterations:
            return _failed(y, iteration, "DIVERGED_MAX_IT", residual)
        pending = ~done.unsqueeze(-1)
        if iteration and worst > 1.0 - _DECREASE:
            assert origin is not None
            assert change is not None
            assert share is not None
            worse = pending & ~(norms <= (1.0 - _DECREASE * share.squeeze(-1)) * before).unsqueeze(-1)
            # A direction of old factors may not reduce the residual at all: begin again where it began.
            share = torch.where(worse, share / 2 if was_fresh else torch.zeros_like(share), 1.0)
            shortest = float(share.min()) if was_fresh and share.numel() else 1.0
            if largest(-shortest, comm) > -_SHORTEST:
                return _failed(y, iteration, "DIVERGED_LINE_SEARCH", residual)
            origin = torch.where(worse, origin, y)
            before = torch.where(worse.squeeze(-1), before if was_fresh else 2 * before, norms)
            change = torch.where(worse, change, torch.where(pending, update, 0.0))
            y = origin - share * change
            factors, was_fresh = None, True
            continue
        if (iteration and not fresh and worst > _SLOW) or iteration >= tolerances.iterations // 2:
            factors = None
        share = torch.ones_like(norms).unsqueeze(-1)
        origin, before, change, was_fresh = y, norms, torch.where(pending, update, 0.0), fresh
        y = y - change
    raise AssertionError("the last iteration returns")


def _norms(states: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(states, dim=-1)
    return found


def _worst(done: torch.Tensor, norms: torch.Tensor, before: torch.Tensor, comm: MPI.Comm) -> float:
    """Return the largest ratio of a residual to the one before, among samples that have not converged.

    0 if all have converged on all ranks. Not finite if a residual is not.
    """
    return largest(float(torch.where(done, 0.0, norms / before).amax()) if norms.numel() else 0.0, comm)


def largest(value: float, comm: MPI.Comm) -> float:
    """Return the largest value of all ranks, infinite if one is no number. Collective."""
    # MPI does not define the maximum of numbers that are not.
    value = math.inf if math.isnan(value) else value
    if comm.size == 1:
        return value
    buffer = np.array([value])
    comm.Allreduce(MPI.IN_PLACE, buffer, MPI.MAX)
    return float(buffer[0])


def _failed(y: torch.Tensor, iterations: int, reason: str, residual: torch.Tensor) -> Solution:
    return Solution(y, None, iterations, reason, float(torch.linalg.vector_norm(residual)))
