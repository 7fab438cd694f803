"""Data assimilation on a whole field in plain torch: one differentiable function, and covariances as dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch

from tests.oracles.runge_kutta import TABLEAUX, odeint_plain


def states_at(
    f: Callable[..., Any],
    u0: torch.Tensor,
    times: Sequence[float],
    step_size: float,
    jumps: dict[float, torch.Tensor] | None = None,
) -> dict[float, torch.Tensor]:
    """The states of rk4 at ascending `times`, with a jump added at some of them, as the state after it."""
    states = {times[0]: u0}
    for begin, end in pairwise(times):
        state = odeint_plain(f, states[begin], [begin, end], TABLEAUX["4"], step_size)[-1]
        states[end] = state + jumps[end] if jumps and end in jumps else state
    return states


def second_difference(points: int, periodic: bool) -> np.ndarray[Any, Any]:
    """The matrix of second differences of a line, with a zero slope at its ends unless it is periodic."""
    matrix = -2 * np.eye(points) + np.eye(points, k=1) + np.eye(points, k=-1)
    if periodic:
        matrix[0, -1] += 1
        matrix[-1, 0] += 1
    else:
        matrix[0, 0] += 1
        matrix[-1, -1] += 1
    return matrix


def matern_root(shape: Sequence[int], cells: Sequence[float], periodic: Sequence[bool]) -> torch.Tensor:
    """The root of the covariance of one field on a grid: a scaled inverse of one minus the Laplacian."""
    total = np.eye(math.prod(shape))
    for axis, (length, wraps) in enumerate(zip(cells, periodic, strict=True)):
        factors = [np.eye(points) for points in shape]
        factors[axis] = second_difference(shape[axis], wraps)
        term = np.ones((1, 1))
        for factor in factors:
            term = np.kron(term, factor)
        total -= length**2 * term
    volume = {1: 4.0, 2: 4 * math.pi, 3: 8 * math.pi}[len(shape)] * math.prod(cells)
    return torch.from_numpy(math.sqrt(volume) * np.linalg.inv(total))


def islands_root(
    shape: Sequence[int], cells: Sequence[float], periodic: Sequence[bool], inside: np.ndarray[Any, Any]
) -> torch.Tensor:
    """The root of the covariance of a field inside a mask, pair by pair of neighbours; points outside are alone."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    total = np.eye(numbers.size)
    for point, axis in product(np.ndindex(*shape), range(len(shape))):
        other = list(point)
        other[axis] += 1
        if other[axis] == shape[axis] and not periodic[axis]:
            continue
        other[axis] %= shape[axis]
        if inside[point] and inside[tuple(other)]:
            pair = [numbers[point], numbers[tuple(other)]]
            total[np.ix_(pair, pair)] += cells[axis] ** 2 * np.array([[1, -1], [-1, 1]])
    volume = {1: 4.0, 2: 4 * math.pi, 3: 8 * math.pi}[len(shape)] * math.prod(cells)
    return torch.from_numpy(np.where(inside.ravel(), math.sqrt(volume), 1.0)[:, None] * np.linalg.inv(total))
