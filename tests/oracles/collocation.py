"""Gauss and Radau IIA methods, made from their defining property: collocation at the zeros of polynomials.

The nodes are the zeros of the shifted Legendre polynomial P_s (Gauss, order 2s) or of P_s - P_(s-1) (Radau IIA, order
2s - 1). Row i of the matrix integrates the Lagrange polynomials of the nodes to c_i, and the weights integrate to 1.
E. Hairer, S. P. Norsett, G. Wanner: Solving Ordinary Differential Equations I, section II.7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from numpy.polynomial.legendre import Legendre

Row = tuple[float, ...]


@dataclass(frozen=True)
class Collocation:
    """A fully implicit Runge-Kutta method."""

    order: int
    matrix: tuple[Row, ...]
    weights: Row
    nodes: Row


def collocated(order: int, polynomial: Legendre) -> Collocation:
    """The method of this order at the zeros of a polynomial, which lie between -1 and 1."""
    nodes = np.sort((polynomial.roots().real + 1) / 2)
    integrals = []
    for node in nodes:
        rest = nodes[nodes != node]
        others = Polynomial.fromroots(rest) if len(rest) else Polynomial([1.0])
        integrals.append((others / others(node)).integ())
    matrix = tuple(tuple(float(integral(node)) for integral in integrals) for node in nodes)
    return Collocation(order, matrix, tuple(float(integral(1.0)) for integral in integrals), tuple(map(float, nodes)))


def gauss(stages: int) -> Collocation:
    """The Gauss method of so many stages."""
    return collocated(2 * stages, Legendre.basis(stages))


def radau(stages: int) -> Collocation:
    """The Radau IIA method of so many stages."""
    return collocated(2 * stages - 1, Legendre.basis(stages) - Legendre.basis(stages - 1))


COLLOCATION = {"gauss4": gauss(2), "gauss6": gauss(3), "radau3": radau(2), "radau5": radau(3)}
