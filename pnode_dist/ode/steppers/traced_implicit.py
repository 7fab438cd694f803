"""A step of many small implicit systems as a function that torch can trace, for `compiled_segment`.

Each stage is solved by a fixed number of updates. Jacobians are made by torch.func, and each serves several updates:
this is Shamanskii's method, of order m + 1 for m updates with one Jacobian (C. T. Kelley: Iterative Methods for Linear
and Nonlinear Equations, SIAM (1995), section 5.4.3). The last update is a function that autograd differentiates, at a
fixed Jacobian A:

    Y = y - A^-1 (M y - reach g(t, y; theta) - base),  A = M - reach dg/dy.

At the solution its derivatives with respect to base, times and theta are those of the implicit function theorem. So
one pass of autograd through the steps is their discrete adjoint, and needs no further solves.

Whether the updates were enough is a further result: the next call can go on where this one ended, see
`BatchedSegments`. All tensors are in PETSc's scalar type: states `[sample, component]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pnode_dist.ode.rhs.evaluation import BoundFunction, Function
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.additive_tableau import AdditiveTableau
from pnode_dist.ode.steppers.batched_samples import Split, parts_of
from pnode_dist.ode.steppers.compiled_segment import Step, TracedStep, Turns
from pnode_dist.ode.steppers.traced_explicit import one_evaluation
from pnode_dist.petsc import vectors

_JACOBIANS, _UPDATES_EACH = 2, 4
UPDATES = _JACOBIANS * _UPDATES_EACH + 1
"""Updates of each stage in one call: several with each of some Jacobians, and one with the last. Most segments need one
call."""
ROUNDING = 1e3
"""Residuals of products with f's derivative may be this many units of rounding."""


@dataclass(frozen=True)
class ImplicitStep:
    """The parts of the right-hand side, the method and the samples of a state, of which a step is traced.

    `explicit` is None if all of the right-hand side is implicit.
    """

    implicit: Function
    explicit: Function | None
    layout: StateLayout
    tableau: AdditiveTableau
    split: Split

    @property
    def solved_stages(self) -> int:
        """The number of stages that have equations."""
        return sum(self.tableau.implicit[i][i] != 0 for i in range(self.tableau.stages))

    def turns(self, segment: Segment) -> Turns:
        """Return starts, sizes, guesses `[step, stage, sample, component]` and first residuals `[step, stage, sample]`.

        Negative residuals stand for a stage that is solved for the first time. Its guess is the stage before it.
        """
        (samples, widths), dtype = self.split, vectors.scalar_dtype()
        shape = (len(segment), self.solved_stages, samples)
        guesses = torch.zeros(*shape, sum(widths), dtype=dtype)
        return *segment.tensors(), guesses, torch.full(shape, -1.0, dtype=dtype)

    def refusal(self, bound: BoundFunction, state: Parts, start: float, size: float) -> None:
        """Evaluate f, see `TracedStep`."""
        one_evaluation(self.layout, bound, parts_of(state[0], self.layout, self.split.widths), start, size)

    def constants(self, limits: torch.Tensor, mass: torch.Tensor | None) -> tuple[Any, ...]:
        """Return the tolerances of Newton's method, the blocks of M, and a vector that tells samples apart."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.split.samples, sum(self.split.widths))
        return limits, mass, torch.rand(shape, dtype=vectors.scalar_dtype(), generator=generator).add_(0.5)


def traced_implicit(parts: ImplicitStep, limits: torch.Tensor, mass: torch.Tensor | None) -> TracedStep:
    """Return the step of a method of the families theta, arkimex and dirk.

    Its further results are the solutions of the stages before their last update, their residuals before the first one,
    and the largest residual of a sample that has not converged: 0 if all have.
    """
    return TracedStep(
        _step(parts),
        parts.solved_stages * UPDATES,
        parts.tableau.stages,
        parts.refusal,
        parts.turns,
        constants=parts.constants(limits, mass),
        # One compilation, of up to a minute, then serves both. Code without a tape was no faster.
        always_with_tape=True,
    )


def _step(parts: ImplicitStep) -> Step:
    # Plain values, because torch's compiler cannot look into the locks of cached properties.
    tableau, explicit = parts.tableau, parts.explicit
    nodes, rows, weights = tableau.nodes, tableau.implicit, tableau.weights
    explicit_nodes, explicit_rows = tableau.explicit_nodes, tableau.explicit
    explicit_weights, ends_in_last_stage = tableau.explicit_weights, tableau.ends_in_last_stage
    uses, uses_explicit = tableau.uses_slope, tableau.uses_explicit_slope
    implicit_value = partial(_value, parts.implicit, parts.layout, parts.split)
    explicit_value = None if explicit is None else partial(_value, explicit, parts.layout, parts.split)
    eps = torch.finfo(parts.layout.compute_dtype).eps

    def step(state: Parts, turns: Turns, args: tuple[Any, ...]) -> Parts:
        limits, mass, apart, *others = args
        starts, sizes, guesses, firsts = turns
        start, size, guess, first = starts[0], sizes[0], guesses[0], firsts[0]
        (before,) = state
        begin = _multiplied(mass, before)
        slopes: list[torch.Tensor | None] = []
        explicit_slopes: list[torch.Tensor | None] = []
        solutions: list[torch.Tensor] = []
        residuals: list[torch.Tensor] = []
        worst: list[torch.Tensor] = []
        stage = before
        for i, node in enumerate(nodes):
            when, diagonal = start + node * size, rows[i][i]
            base = _combined(begin, size, rows[i], slopes)
            if explicit_value is not None:
                base = _combined(base, size, explicit_rows[i], explicit_slopes)
            if diagonal == 0:
                stage = base if i else before
                slopes.append(implicit_value(when, stage, others) if uses[i] else None)
            else:
                number, reach = len(solutions), diagonal * size
                equations = _Equations(implicit_value, when, reach, base, mass, tuple(others))
                found = _solved_stage(equations, stage, guess[number], first[number], limits, apart, eps)
                stage = found[0]
                slopes.append((_multiplied(mass, stage) - base) / reach if uses[i] else None)
                for results, value in zip((solutions, residuals, worst), found[1:], strict=True):
                    results.append(value)
            if explicit_value is not None:
                when, used = start + explicit_nodes[i] * size, uses_explicit[i]
                explicit_slopes.append(explicit_value(when, stage, others) if used else None)
        further = (torch.stack(solutions), torch.stack(residuals), torch.stack(worst).amax())
        if ends_in_last_stage:
            return stage, *further
        if len(weights) == 1:
            # The slope itself would need the inverse of M.
            return before + (stage - before) * (weights[0] / rows[0][0]), *further
        result = _combined(before, size, weights, slopes)
        if explicit_value is not None:
            result = _combined(result, size, explicit_weights, explicit_slopes)
        return result, *further

    return step


@dataclass(frozen=True)
class _Equations:
    """The equations M y - reach g(time, y) = base of a stage, for all samples."""

    value: Callable[[torch.Tensor, torch.Tensor, Sequence[Any]], torch.Tensor]
    time: torch.Tensor
    reach: torch.Tensor
    base: torch.Tensor
    mass: torch.Tensor | None
    args: tuple[Any, ...]


def _solved_stage(
    equations: _Equations,
    before: torch.Tensor,
    guess: torch.Tensor,
    first: torch.Tensor,
    limits: torch.Tensor,
    apart: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the state of a stage, what it was before the last update, the first residuals, and the largest residual.

    The largest residual is of a sample that has not converged. It is infinite where a block has no inverse, and where
    the derivative of g has entries between samples: its product with the vector `apart` is not that of the blocks.
    """
    constant = _Equations(
        equations.value,
        equations.time.detach(),
        equations.reach.detach(),
        equations.base.detach(),
        equations.mass,
        equations.args,
    )
    y = torch.where(first.unsqueeze(-1) < 0.0, before, guess).detach()
    for number in range(_JACOBIANS):
        value, jacobians, _ = _linearised(constant, y)
        solve = _solver(_blocks(constant, jacobians.detach()))
        for repeat in range(_UPDATES_EACH):
            if repeat:
                value = constant.value(constant.time, y, constant.args)
            residual = _residual(constant, value, y).detach()
            if number == repeat == 0:
                first = torch.where(first < 0.0, _norms(residual), first)
            y = y - solve(residual)
    value, jacobians, pull = _linearised(equations, y)
    jacobians = jacobians.detach()
    residual = _residual(equations, value, y)
    update = _solver(_blocks(constant, jacobians))(residual)
    norms = _norms(residual.detach())
    # See `batched_newton.solve` for the tests.
    enough = torch.maximum(first * limits[0], limits[1] * constant.reach.abs())
    done = (norms <= enough) | (_norms(update.detach()) <= limits[2] * _norms(y))
    (product,) = pull(apart)
    blockwise = torch.matmul(jacobians.mT, apart.unsqueeze(-1)).squeeze(-1)
    scale = torch.matmul(jacobians.mT.abs(), apart.unsqueeze(-1)).squeeze(-1) + product.abs()
    blocks_are_all = ((product - blockwise).abs() <= ROUNDING * eps * scale).all(dim=-1)
    works = (blocks_are_all & torch.isfinite(update).all(dim=-1)).detach()
    worst = torch.where(works, torch.where(done, 0.0, norms), torch.inf).amax()
    return y - update, y, first, worst


def _linearised(
    equations: _Equations, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor]]]:
    """Return g at `y`, its blocks `[sample, row, column]`, and the function that multiplies J^T by a vector."""
    samples, components = y.shape
    value, pull, *_ = torch.func.vjp(lambda states: equations.value(equations.time, states, equations.args), y)
    unit = torch.eye(components, dtype=y.dtype)
    (rows,) = torch.func.vmap(pull)(unit.unsqueeze(1).expand(components, samples, components))
    return value, rows.transpose(0, 1), pull


def _residual(equations: _Equations, value: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _multiplied(equations.mass, y) - equations.base - equations.reach * value


def _blocks(equations: _Equations, jacobians: torch.Tensor) -> torch.Tensor:
    """Return M - reach J."""
    unit = torch.eye(jacobians.shape[-1], dtype=jacobians.dtype) if equations.mass is None else equations.mass
    return unit - equations.reach * jacobians


def _value(
    func: Function,
    layout: StateLayout,
    split: Split,
    time: torch.Tensor,
    states: torch.Tensor,
    args: Sequence[Any],
) -> torch.Tensor:
    samples, widths = split
    pieces = torch.split(states, list(widths), dim=1)
    parts = [piece.to(layout.compute_dtype).reshape(shape) for piece, shape in zip(pieces, layout.shapes, strict=True)]
    result = func(time.to(layout.compute_dtype), layout.as_state(parts), *args)
    values = tuple(result) if layout.is_tuple else (result,)
    if [tuple(value.shape) for value in values] != list(layout.shapes):
        raise ValueError("func returned another shape than that of the state")
    joined = [value.to(states.dtype).reshape(samples, width) for value, width in zip(values, widths, strict=True)]
    return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)


def _multiplied(mass: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    return states if mass is None else torch.matmul(mass, states.unsqueeze(-1)).squeeze(-1)


def _combined(
    start: torch.Tensor, size: torch.Tensor, row: Sequence[float], slopes: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    for weight, slope in zip(row, slopes, strict=False):
        if weight and slope is not None:
            start = start + (size * weight) * slope
    return start


def _norms(states: torch.Tensor) -> torch.Tensor:
    return states.square().sum(dim=-1).sqrt()


def _solver(blocks: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that solves the systems of all samples.

    Systems of up to three components are solved by Cramer's rule, which fuses with f. Newton's method sees its rounding
    in the residual of the next update.
    """
    components = blocks.shape[-1]
    if components > 3:
        lu, pivots, _ = torch.linalg.lu_factor_ex(blocks)
        return lambda sides: torch.linalg.lu_solve(lu, pivots, sides.unsqueeze(-1)).squeeze(-1)
    if components == 1:
        return lambda sides: sides / blocks[..., 0]
    if components == 2:
        signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=blocks.dtype)
        cofactors = blocks.flip((-2, -1)) * signs
    else:
        # Cyclic indices carry the signs.
        forward, backward = (1, 1), (-1, -1)
        cofactors = blocks.roll(forward, (-2, -1)) * blocks.roll(backward, (-2, -1))
        cofactors = cofactors - blocks.roll((1, -1), (-2, -1)) * blocks.roll((-1, 1), (-2, -1))
    # Each row gives the determinant. One of them alone would be selected by a slower operation.
    determinants = (blocks * cofactors).sum(dim=(-2, -1)).unsqueeze(-1) / components
    return lambda sides: (cofactors * sides.unsqueeze(-1)).sum(dim=-2) / determinants
