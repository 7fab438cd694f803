"""The error estimate of an explicit step, and the component of the state that it is largest in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mpi4py import MPI

from pnode_dist.ode.rhs.layout import Parts
from pnode_dist.ode.steppers.tableau import Tableau, Terms

Factors = Sequence[torch.Tensor | float]
_WEIGHT_OF_SECOND = 0.01


def difference(terms: Terms, size: float, slopes: Sequence[Parts]) -> list[torch.Tensor]:
    """Return `size` times the weighted sum of slopes in `terms`: the result minus that of an embedded method."""
    (first, weight), *others = terms
    errors = [torch.mul(slope, size * weight) for slope in slopes[first]]
    for stage, other in others:
        for error, slope in zip(errors, slopes[stage], strict=True):
            error.add_(slope, alpha=size * other)
    return errors


def tolerated(before: Parts, after: Parts, rtol: Factors, atol: Factors) -> Parts:
    """Return the tolerated error of each entry of a step from `before` to `after`."""
    tolerances = zip(before, after, rtol, atol, strict=True)
    return tuple(torch.maximum(start.abs(), end.abs()).mul_(r).add_(a) for start, end, r, a in tolerances)


def corrected(first: float, second: float) -> float:
    """Return the error of DOP853 from the norms of its two estimates, of orders 5 and 3.

    E. Hairer, S. P. Norsett, G. Wanner: Solving Ordinary Differential Equations I, 2nd ed. (1993), section II.10.
    """
    if first == 0:
        return 0.0
    return first * first / math.sqrt(first * first + _WEIGHT_OF_SECOND * second * second)


def largest_component(
    comm: MPI.Comm, tableau: Tableau, size: float, slopes: Sequence[Parts], scales: Parts, is_tuple: bool
) -> str:
    """Return words for the component whose error is largest relative to its tolerance. Collective on `comm`."""
    place, most = "", -1.0
    for number, (error, scale) in enumerate(zip(difference(tableau.error_terms, size, slopes), scales, strict=True)):
        # Entries without a tolerance are not controlled.
        ratios = (error.abs() / scale).nan_to_num(nan=math.inf, posinf=math.inf).where(scale > 0, 0.0)
        if ratios.numel() and float(ratios.max()) > most:
            most, at = float(ratios.max()), int(ratios.argmax())
            index = [int(axis) for axis in torch.unravel_index(torch.tensor(at), ratios.shape)]
            place = f"part {number}, entry {index}" if is_tuple else f"entry {index}"
    found = comm.allgather((most, place))
    rank = max(range(comm.size), key=lambda number: found[number][0])
    where = "" if comm.size == 1 else f" of rank {rank}"
    return f"the error of {found[rank][1]}{where} is {found[rank][0]:.3g} times its tolerance"
