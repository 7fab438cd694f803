"""One step of an explicit Runge-Kutta method, and its discrete adjoint.

Stage i evaluates k_i = f(t + c_i h, u + h sum_j a_ij k_j), and the result is u + h sum_i b_i k_i.

Let lambda be the adjoint of the result, and J_i the Jacobian of f at stage i. For i = s, ..., 1,
v_i = h (b_i lambda + sum_{j > i} a_ji w_j) and w_i = J_i^T v_i. The adjoint of the state before the step is
lambda + sum_i w_i, and (df/dtheta)^T v_i is added to the gradient with respect to the parameters. This is the chain
rule, backward through the formulas of the step. Autograd applies it where the whole step is one graph (`graph_tape`);
`pull_back_step` applies it where each stage has a tape of its own (`stage_tape`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.steppers.adjoint_sums import Products
from pnode_dist.ode.steppers.symplectic_step import Composition, pull_back_composed, take_composed
from pnode_dist.ode.steppers.tableau import Tableau, Terms

Slopes = list[Parts]
"""f at the stages of a step so far, in the type of the state; empty where it is not needed."""

Scheme = Tableau | Composition
"""A method: the coefficients of its steps."""


class Evaluate(Protocol):
    """f at a time and a state, both in the type of the state. `half`: only this half is used, see `halves_of`."""

    def __call__(self, time: float, state: Parts, half: int | None = None) -> Parts:
        """Return f."""
        ...


class PullBack(Protocol):
    """J^T v for a cotangent v of the last stage that was not pulled back yet, of which f had the `half`."""

    def __call__(self, cotangents: Products, half: int | None = None) -> Products:
        """Return the product."""
        ...


def take_step(tableau: Scheme, time: float, size: float, state: Parts, evaluate: Evaluate) -> Parts:
    """Return the state after a step of `size` from `state` at `time`, in new memory. Collective if f is.

    With gradients enabled the step is a graph of torch. Each slope is freed after its last use.
    """
    if isinstance(tableau, Composition):
        return take_composed(tableau, time, size, state, evaluate)
    step = OpenStep(tableau, size, state)
    for stage, node in enumerate(tableau.c):
        if tableau.counts[stage]:
            step.append(evaluate(time + node * size, step.next_state()))
        else:
            step.append(())
        for used in tableau.last_uses[stage]:
            step.slopes[used] = ()
    return step.result


def pull_back_step(
    tableau: Scheme, size: float, adjoint: Sequence[torch.Tensor], pull_back: PullBack
) -> list[torch.Tensor]:
    """Return the adjoint of the state before a step of `size`, given the `adjoint` of its result.

    Calls `pull_back` for the stages that the result depends on, from the last to the first. Collective if it is.
    """
    if isinstance(tableau, Composition):
        return pull_back_composed(tableau, size, adjoint, pull_back)
    products: dict[int, Products] = {}
    for stage in reversed(range(len(tableau.b))):
        if tableau.counts[stage]:
            weighted: list[tuple[Products, float]] = [(adjoint, size * tableau.b[stage])] if tableau.b[stage] else []
            weighted += [(products[later], size * a) for later, a in tableau.uses[stage] if later in products]
            products[stage] = pull_back(tuple(_sum(part, number, weighted) for number, part in enumerate(adjoint)))
    every = [(product, 1.0) for product in products.values()]
    return [_sum(part, number, [(adjoint, 1.0), *every]) for number, part in enumerate(adjoint)]


class OpenStep:
    """A step in progress, for callers that evaluate f stage by stage.

    `slopes` are those of the stages so far. `result` is the state plus their weighted sum.
    """

    def __init__(self, tableau: Tableau, size: float, state: Parts) -> None:
        self.tableau, self.size, self.state = tableau, size, state
        self.slopes: Slopes = []
        self._result: Parts | None = None

    def next_state(self) -> Parts:
        """Return the state of the next stage: a view of the state before the step if that stage uses no other."""
        terms = self.tableau.stage_terms[len(self.slopes)]
        return combined(self.state, self.size, terms, self.slopes) if terms else viewed(self.state)

    def append(self, slope: Parts) -> None:
        """Add f at the next stage; empty if the result does not depend on it."""
        weight = self.size * self.tableau.b[len(self.slopes)]
        self.slopes.append(slope)
        if weight and self._result is None:
            self._result = combined(self.state, 1.0, ((0, weight),), [slope])
        elif weight:
            # One term at a time: a backward pass then forms each multiple of the adjoint at its stage, not all at once.
            for part, rate in zip(self.result, slope, strict=True):
                part.add_(rate, alpha=weight)

    @property
    def result(self) -> Parts:
        """The result so far."""
        assert self._result is not None
        return self._result


def viewed(state: Parts) -> Parts:
    """Return the state for f alone: a backward pass sums f's contributions to the adjoint before it adds others."""
    return tuple([part.view_as(part) for part in state])


def combined(state: Parts, size: float, terms: Terms, slopes: Sequence[Parts]) -> Parts:
    """Return the state plus `size` times the weighted sum of slopes in `terms`, at least one, in new memory."""
    (first, weight), *others = terms
    parts = []
    for number, part in enumerate(state):
        sum_of_terms = torch.add(part, slopes[first][number], alpha=size * weight)
        for other, coefficient in others:
            sum_of_terms.add_(slopes[other][number], alpha=size * coefficient)
        parts.append(sum_of_terms)
    return tuple(parts)


def _sum(like: torch.Tensor, number: int, weighted: Sequence[tuple[Products, float]]) -> torch.Tensor:
    """Return the weighted sum of part `number` of several products, of which None is zero, in new memory."""
    total: torch.Tensor | None = None
    for products, weight in weighted:
        product = products[number]
        if product is not None:
            total = torch.mul(product, weight) if total is None else total.add_(product, alpha=weight)
    # Also where nothing contributes, f is differentiated: other ranks may have to exchange values with this one.
    return torch.zeros_like(like) if total is None else total
