"""Additive and diagonally implicit Runge-Kutta tableaux, and the conditions under which they have an order.

A step of size h from u at t of du/dt = g(t, u) + h(t, u), g implicit and h explicit:

    U_i = u + h sum_{j <= i} implicit[i][j] K_j + h sum_{j < i} explicit[i][j] H_j
    K_i = g(t + implicit_nodes[i] h, U_i),  H_i = h(t + explicit_nodes[i] h, U_i)
    u + h sum_i implicit_weights[i] K_i + h sum_i explicit_weights[i] H_i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import combinations_with_replacement

import numpy as np

Row = tuple[float, ...]
# A rooted tree: the colour of its root (0 implicit, 1 explicit) and the sorted subtrees at it.
Tree = tuple[int, tuple["Tree", ...]]


@dataclass(frozen=True)
class ImplicitTableau:
    """An additive Runge-Kutta method whose implicit part is diagonally implicit.

    Row i of `implicit` ends with the diagonal entry, row i of `explicit` before it. Without an explicit part
    (`explicit` empty) the method is a DIRK method. The weights `embedded` serve both parts of the method of order
    `embedded_order` that estimates the error.
    """

    order: int
    implicit: tuple[Row, ...]
    implicit_weights: Row
    explicit: tuple[Row, ...] = ()
    explicit_weights: Row = ()
    embedded: Row | None = None
    embedded_order: int | None = None

    def __post_init__(self) -> None:
        stages = len(self.implicit_weights)
        assert [len(row) for row in self.implicit] == [*range(1, stages + 1)]
        assert self.embedded is None or len(self.embedded) == stages
        if self.additive:
            assert [len(row) for row in self.explicit] == [*range(stages)]
            assert len(self.explicit_weights) == stages

    @property
    def additive(self) -> bool:
        """Whether there is an explicit part."""
        return bool(self.explicit)

    @property
    def implicit_nodes(self) -> Row:
        """The times of the stages of the implicit part, as fractions of the step: the sums of the rows."""
        return tuple(sum(row) for row in self.implicit)

    @property
    def explicit_nodes(self) -> Row:
        """The times of the stages of the explicit part, as fractions of the step: the sums of the rows."""
        return tuple(sum(row) for row in self.explicit)

    @property
    def explicit_first_stage(self) -> bool:
        """Whether the first stage is the state at the start of the step."""
        return self.implicit[0] == (0.0,)

    @property
    def stiffly_accurate(self) -> bool:
        """Whether the last stage is the result of the step, as far as the implicit part goes."""
        return self.implicit[-1] == self.implicit_weights


def numbers(text: str) -> Row:
    """Numbers from fractions and decimals that are separated by blanks, each rounded once."""
    return tuple(float(Fraction(entry)) for entry in text.split())


def rows(text: str) -> tuple[Row, ...]:
    """The rows of a triangle, separated by semicolons."""
    return tuple(numbers(row) for row in text.split(";"))


def dirk(
    order: int,
    implicit: str | tuple[Row, ...],
    *,
    weights: str | Row | None = None,
    embedded: str | Row,
    embedded_order: int,
) -> ImplicitTableau:
    """A diagonally implicit method; without `weights` the last stage is the result of the step."""
    triangle = rows(implicit) if isinstance(implicit, str) else implicit
    result = triangle[-1] if weights is None else _row(weights)
    return ImplicitTableau(order, triangle, result, embedded=_row(embedded), embedded_order=embedded_order)


def additive(
    order: int,
    implicit: str | tuple[Row, ...],
    explicit: str | tuple[Row, ...],
    *,
    weights: str | Row | None = None,
    embedded: str | Row | None = None,
    embedded_order: int | None = None,
) -> ImplicitTableau:
    """An additive method with the same weights for both parts, by default those of the last implicit stage.

    `explicit` starts at the second stage: the first has no earlier one.
    """
    triangle = rows(implicit) if isinstance(implicit, str) else implicit
    earlier = rows(explicit) if isinstance(explicit, str) else explicit
    result = triangle[-1] if weights is None else _row(weights)
    estimate = None if embedded is None else _row(embedded)
    return ImplicitTableau(order, triangle, result, ((), *earlier), result, estimate, embedded_order)


def _row(entries: str | Row) -> Row:
    return numbers(entries) if isinstance(entries, str) else entries


@lru_cache
def coloured_trees(vertices: int, colours: int) -> tuple[Tree, ...]:
    """All rooted trees with so many vertices, each of one of the colours."""
    forests = sorted(set(_forests(vertices - 1, vertices - 1, colours)))
    return tuple((colour, forest) for colour in range(colours) for forest in forests)


def _forests(vertices: int, largest: int, colours: int) -> Iterator[tuple[Tree, ...]]:
    if vertices == 0:
        yield ()
    for size in range(1, min(vertices, largest) + 1):
        for count in range(1, vertices // size + 1):
            for chosen in combinations_with_replacement(coloured_trees(size, colours), count):
                for rest in _forests(vertices - size * count, size - 1, colours):
                    yield tuple(sorted((*chosen, *rest)))


def _vertices(tree: Tree) -> int:
    return 1 + sum(_vertices(branch) for branch in tree[1])


def _density(tree: Tree) -> int:
    result = _vertices(tree)
    for branch in tree[1]:
        result *= _density(branch)
    return result


def _square(triangle: Sequence[Row]) -> np.ndarray:
    full = np.zeros((len(triangle), len(triangle)))
    for i, row in enumerate(triangle):
        full[i, : len(row)] = row
    return full


def order_defect(table: ImplicitTableau, order: int, embedded: bool = False) -> float:
    """The largest violation of the conditions for `order`, of the method or of the embedded one.

    For every rooted tree whose vertices are implicit or explicit, sum_i weights_i phi_i(tree) = 1 / density(tree),
    the matrix of each vertex being that of its colour; with one colour these are Butcher's conditions.
    A. L. Araujo, A. Murua, J. M. Sanz-Serna: Symplectic methods based on decompositions, SIAM J. Numer. Anal. 34
    (1997), 1926-1947, section 3; C. A. Kennedy, M. H. Carpenter, Appl. Numer. Math. 44 (2003), 139-181, section 2.
    As each part is evaluated at the sums of its own rows, time may be an argument of both.
    """
    parts = [table.implicit, *([table.explicit] if table.additive else [])]
    matrices = [_square(part) for part in parts]
    if embedded:
        assert table.embedded is not None
        weights = [np.array(table.embedded)] * len(parts)
    else:
        weights = [np.array(table.implicit_weights), np.array(table.explicit_weights)][: len(parts)]

    @cache
    def elementary_weights(branches: tuple[Tree, ...]) -> np.ndarray:
        factors = np.ones(len(table.implicit))
        for colour, inner in branches:
            factors = factors * (matrices[colour] @ elementary_weights(inner))
        return factors

    return max(
        abs(float(weights[tree[0]] @ elementary_weights(tree[1])) - 1 / _density(tree))
        for vertices in range(1, order + 1)
        for tree in coloured_trees(vertices, len(parts))
    )
