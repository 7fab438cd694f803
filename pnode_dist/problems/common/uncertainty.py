"""The standard deviations that an inversion adds to its file, where they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode_dist.errors import ConvergenceError
from pnode_dist.inverse import forecast_spread
from pnode_dist.train.problem import Inversion


def deviations_of(
    found: Inversion, times: Sequence[float], members: int, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the standard deviations of an inversion by name, and the figures that say what is missing. Collective.

    `initial_deviation` is that of the initial state by Laplace's approximation, and `deviation` that of `members`
    forecasts from samples at `times`. Without an approximation there is neither.
    """
    if found.approximation is None:
        return {}, {}
    (variances,) = found.inverse.space.unpack(found.approximation.variances())
    deviations = {"initial_deviation": variances.sqrt()}
    if members:
        try:
            deviations["deviation"] = forecast_spread(found.approximation, times, members, seed).deviation
        except ConvergenceError as error:
            return deviations, {"spread": f"none: {error}"}
    return deviations, {}
