"""A PID controller of the step size in plain Python, from the documentation of diffrax's `PIDController`.

The sizes are in units of the independent variable, and the method is Dormand & Prince's pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch

from tests.oracles.runge_kutta import TABLEAUX

# Dormand & Prince 1980, the weights of order 4.
_FOURTH = [
    Fraction(entry) for entry in ("5179/57600", "0", "7571/16695", "393/640", "-92097/339200", "187/2100", "1/40")
]


def controlled_steps(
    func: Callable[[float, torch.Tensor], torch.Tensor],
    u: torch.Tensor,
    first: float,
    end: float,
    rtol: float,
    atol: float,
    pcoeff: float,
    icoeff: float,
    dcoeff: float,
) -> tuple[list[float], int]:
    """The sizes of the accepted steps from 0 until one passes `end`, and the number of the rejected ones."""
    table, time, size = TABLEAUX["5dp"], 0.0, first
    inverse, before = 1.0, 1.0
    sizes: list[float] = []
    rejected = 0
    while time < end:
        slopes: list[torch.Tensor] = []
        for row, node in zip(table.stages, table.nodes, strict=True):
            stage = u + sum((size * float(a) * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(u))
            slopes.append(func(time + float(node) * size, stage))
        result = u + sum((size * float(b) * k for b, k in zip(table.weights, slopes, strict=True)), torch.zeros_like(u))
        fourth = u + sum((size * float(b) * k for b, k in zip(_FOURTH, slopes, strict=True)), torch.zeros_like(u))
        scale = atol + rtol * torch.maximum(u.abs(), result.abs())
        now = 1 / math.sqrt(float(((result - fourth) / scale).square().mean()))
        keep = now > 1
        factor = 0.9 * now ** ((pcoeff + icoeff + dcoeff) / 5)
        factor *= inverse ** (-(pcoeff + 2 * dcoeff) / 5) * before ** (dcoeff / 5)
        factor = min(max(factor, 1.0 if keep else 0.2), 10.0 if keep else 0.9)
        if keep:
            sizes.append(size)
            time, u = time + size, result
            inverse, before = now, inverse
        else:
            rejected += 1
        size *= factor
    return sizes, rejected
