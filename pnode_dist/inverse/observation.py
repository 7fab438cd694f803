"""Observations of a trajectory: times, an operator, data and their covariance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.covariance import Covariance, CovarianceLike, covariance_of, whitened

Operator = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Observation:
    """Data of the state at one time `t`, or at several.

    `operator` is a torch function of this rank's part of the state. It returns the observed values that belong to this
    rank, possibly none; each value belongs to one rank. It may communicate, and is called on all ranks alike. None
    observes the whole state. `data` are the values of this rank, `[*values]` for one time and `[len(t), *values]` for
    several. `covariance` is that of their errors, or their variance. The observation adds
    (H(u) - data)^T R^-1 (H(u) - data) / 2 to the function that is minimised.
    """

    t: float | Sequence[float]
    operator: Operator | None
    data: torch.Tensor
    covariance: CovarianceLike = 1.0

    @property
    def times(self) -> tuple[float, ...]:
        """The times, also of one."""
        return (float(self.t),) if isinstance(self.t, int | float) else tuple(map(float, self.t))

    def values(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the observed values of the states at `times`, in the shape of the data. Collective if H is."""
        operator: Operator = (lambda state: state) if self.operator is None else self.operator
        found = [operator(state) for state in states]
        return found[0] if isinstance(self.t, int | float) else torch.stack(found)

    @cached_property
    def errors(self) -> Covariance:
        """The covariance of the data's errors."""
        return covariance_of(self.covariance, "observation: covariance")

    def residual(self, values: torch.Tensor) -> torch.Tensor:
        """Return L^-1 (values - data), flat, with R = L L^T. Collective if the covariance is."""
        return whitened(values.double() - self.data.detach().double(), self.errors).reshape(-1)


def check_observation(observation: Observation, state: torch.Tensor, start: float, name: str) -> None:
    """Raise `ConfigurationError` if an observation does not fit a state. Collective if its operator is."""
    times = observation.times
    if not times or any(not start <= time < float("inf") for time in times) or list(times) != sorted(set(times)):
        raise ConfigurationError(
            f"{name}: t = {observation.t!r}: must be finite, ascending, and from start = {start:g} on"
        )
    with torch.no_grad():
        values = observation.values([state] * len(times))
    data = observation.data
    if tuple(values.shape) != tuple(data.shape):
        raise ConfigurationError(
            f"{name}: data have shape {tuple(data.shape)} on this rank: must be {tuple(values.shape)}, that of the "
            "operator's values"
        )
    if not data.isfinite().all():
        raise ConfigurationError(f"{name}: data: must be finite: leave missing values out by the operator")
