"""One step of a symplectic composition for a separable system, and its discrete adjoint.

For dq/dt = v(t, p), dp/dt = a(t, q) a step alternates kicks p <- p + k_i h a(t_q, q) and drifts
q <- q + d_i h v(t_p, p). Each drift advances the time t_q of the positions by d_i h, and each kick that of the momenta,
t_p, by k_i h: an explicit dependence on time keeps the order of the method.

L. Verlet, Phys. Rev. 159 (1967). H. Yoshida: Construction of higher order symplectic integrators, Phys. Lett. A 150
(1990). E. Hairer, C. Lubich, G. Wanner: Geometric Numerical Integration, 2nd ed. (2006), sections II.4 and V.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.separable import MOMENTA, POSITIONS, halves_of

Products = Sequence[torch.Tensor | None]


class Move(NamedTuple):
    """A kick (`half` MOMENTA) or a drift (`half` POSITIONS) of `weight` steps, at `node` steps after the start."""

    half: int
    weight: float
    node: float


@dataclass(frozen=True)
class Composition:
    """The kicks and drifts of a step: a kick first and last, and a drift between each two kicks."""

    kicks: tuple[float, ...]
    drifts: tuple[float, ...]

    error_terms = second_error_terms = ()
    """There is no error estimate."""

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """All kicks and drifts in order."""
        positions, momenta = (0.0, *accumulate(self.drifts)), tuple(accumulate(self.kicks))
        kicks = [Move(MOMENTA, kick, node) for kick, node in zip(self.kicks, positions, strict=True)]
        drifts = [Move(POSITIONS, drift, node) for drift, node in zip(self.drifts, momenta, strict=False)]
        return (*(move for pair in zip(kicks, drifts, strict=False) for move in pair), kicks[-1])

    @property
    def c(self) -> tuple[float, ...]:
        """The times of the evaluations, as shares of the step."""
        return tuple(move.node for move in self.moves)

    @property
    def counts(self) -> tuple[bool, ...]:
        """For each evaluation, True: the result depends on it."""
        return (True,) * len(self.moves)


def composed(weights: Sequence[float]) -> Composition:
    """Return the composition of leapfrog steps, each of so many steps; adjacent kicks are one."""
    halves = [weight / 2 for weight in weights]
    between = [first + second for first, second in pairwise(halves)]
    return Composition((halves[0], *between, halves[-1]), tuple(weights))


_OUTER = 1 / (2 - 2 ** (1 / 3))
_SIXTH = (0.78451361047755726381949763, 0.23557321335935813368479318, -1.17767998417887100694641568)
COMPOSITIONS = {
    "leapfrog": composed([1.0]),
    "yoshida4": composed([_OUTER, 1 - 2 * _OUTER, _OUTER]),
    "yoshida6": composed([*_SIXTH, 1 - 2 * sum(_SIXTH), *_SIXTH[::-1]]),
}
"""The methods by their names. The weights of `yoshida6` are solution A of Yoshida, with more digits."""


def take_composed(
    composition: Composition, time: float, size: float, state: Parts, evaluate: Callable[[float, Parts, int], Parts]
) -> Parts:
    """Return the state after a step of `size` from `state` at `time`, in new memory. Collective if f is.

    Of each value of f one half is used. With gradients enabled the step is a graph of torch.
    """
    for half, weight, node in composition.moves:
        # Views for f alone: a backward pass sums f's contributions to the adjoint before it adds others.
        slope = evaluate(time + node * size, tuple([part.view_as(part) for part in state]), half)
        state = _moved(state, half, size * weight, slope)
    return state


def _moved(state: Parts, half: int, reach: Any, slope: Sequence[torch.Tensor]) -> Parts:
    return tuple(
        [
            torch.add(part, slope[number], alpha=reach) if number % 2 == half else part
            for number, part in enumerate(state)
        ]
    )


def pull_back_composed(
    composition: Composition,
    size: float,
    adjoint: Sequence[torch.Tensor],
    pull_back: Callable[[Products, int], Products],
) -> list[torch.Tensor]:
    """Return the adjoint of the state before a step of `size`, given the `adjoint` of its result.

    Calls `pull_back` for all kicks and drifts, from the last to the first. Collective if it is.
    """
    result = list(adjoint)
    for half, weight, _ in reversed(composition.moves):
        cotangents = [part * (size * weight) if number % 2 == half else None for number, part in enumerate(result)]
        products = pull_back(cotangents, half)
        result = [part if product is None else part + product for part, product in zip(result, products, strict=True)]
    return result


def traceable_step(func: Any, layout: StateLayout, composition: Composition) -> Callable[..., Parts]:
    """Return the first step of a segment as a function that torch can trace, see `step_loop`."""
    # Plain values, because torch's compiler cannot look into the locks of cached properties.
    shapes, device, dtype = layout.shapes, layout.device, layout.compute_dtype
    state_device, state_dtype, moves = layout.vec_device, layout.state_dtype, composition.moves
    halves = halves_of(func)

    def step(state: Parts, turns: tuple[torch.Tensor, ...], args: tuple[Any, ...]) -> Parts:
        starts, sizes = turns
        start, size = starts[0], sizes[0]
        for half, weight, node in moves:
            time = (start + node * size).to(device, dtype)
            values = tuple(halves[half](time, tuple([part.to(device, dtype) for part in state]), *args))
            for part, shape in zip(values, shapes, strict=True):
                if part.shape != shape or not part.dtype.is_floating_point:
                    raise TypeError("func returned another shape or type than its state's")
            slopes = [part.to(state_device, state_dtype) for part in values]
            moved = [part + (size * weight) * slope for part, slope in zip(state, slopes, strict=True)]
            state = tuple([moved[n] if n % 2 == half else part for n, part in enumerate(state)])
        return state

    return step
