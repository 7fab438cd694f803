"""The coarse equations with a closure, in the units of the solve, and the two ways to learn the closure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.forecast_data import Samples, Start, Windows
from pnode_dist.problems.common.forecast_model import ForecastModel, Take
from pnode_dist.problems.qg.physics import Closure, QGTendency, SmallScaleFilter

HOUR = 3600.0


class ScaledTendency(nn.Module):
    """The equations for w = q / `scale` and times in hours: dw/dt = 3600 f(q) / scale.

    `equations` are in SI units. `scale` `[layer]` is in 1/s, so that states, loss and gradients are numbers near 1.
    `between` is a closure that `StepClosure` applies between the steps, where the equations have none. Collective on
    the partition's communicator.
    """

    scale: torch.Tensor

    def __init__(self, equations: QGTendency, scale: torch.Tensor, between: Closure | None = None) -> None:
        super().__init__()
        self.equations = equations
        self.between = between
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return dw/dt in 1/h in the shape of w, `[..., ny_local, nx_local, 2]`; `t` is unused. Collective."""
        return self.scaled(self.equations(t, w * self.scale))

    @property
    def closure(self) -> Closure | None:
        """The closure, wherever it is applied."""
        return self.between if self.equations.closure is None else self.equations.closure

    def scaled(self, rate: torch.Tensor) -> torch.Tensor:
        """Return a rate of q in 1/s^2 as one of w in 1/h. Not collective."""
        return rate * (HOUR / self.scale)

    def closed(self, w: torch.Tensor) -> torch.Tensor:
        """Return the forcing of dq/dt by the closure alone, in 1/s^2 in the shape of w. Collective."""
        q, closure = w * self.scale, self.closure
        return torch.zeros_like(q) if closure is None else closure(q, *self.equations.velocities(q))


class StepClosure(nn.Module):
    """A map between the steps: a step of `hours` with the closure's forcing alone, and then the filter.

    The splitting is of first order in the step, and evaluates the closure once for each step of any method. The closure
    is that of `tendency`, whose parameters it leaves to the right-hand side. Collective on the partition's
    communicator.
    """

    def __init__(self, tendency: ScaledTendency, small_scales: SmallScaleFilter, hours: float) -> None:
        super().__init__()
        self.small_scales, self.hours = small_scales, hours
        # Methods are not registered: the solve holds the tendency.
        self.closed = tendency.closed
        self.scaled = tendency.scaled

    def forward(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return the state after the closure and the filter in the shape of w; `t` is unused. Collective."""
        filtered: torch.Tensor = self.small_scales(t, w + self.hours * self.scaled(self.closed(w)))
        return filtered


@dataclass(frozen=True)
class ForcingBatch:
    """Coarse states and the forcing that their tendency lacks, for offline training.

    `initial` `[state, *local_shape]` are the states at `starts`, scaled, and `forcing` theirs in 1/s^2.
    """

    samples: Samples
    starts: tuple[Start, ...]
    initial: torch.Tensor
    forcing: torch.Tensor


class QGModel(ForecastModel):
    """Rollouts of windows, and for a `ForcingBatch` the forcing by the closure, `[state, *local_shape]` in 1/s^2."""

    def __init__(self, solve: NeuralODE, tendency: ScaledTendency, small_scales: SmallScaleFilter) -> None:
        super().__init__(solve)
        # The solve applies it, and does not take it to another device.
        self.small_scales = small_scales
        # Not registered a second time: the solve holds it.
        self.closed = tendency.closed

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self.small_scales.factors.device

    def forward(self, batch: Windows | ForcingBatch) -> torch.Tensor:
        """Return the states at the leads 1, 2, ... of the windows, or the forcing. Collective on the state ranks."""
        if isinstance(batch, ForcingBatch):
            return self.closed(batch.initial)
        return super().forward(batch)

    def stream(self, batch: Windows, take: Take) -> None:
        """Hand the states of each lead to `take` while the solve goes on, in place of `forward`. No gradient."""
        self.follow(batch, take)
