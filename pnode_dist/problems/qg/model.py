"""The coarse equations with a closure, in the units of the solve, and the two ways to learn the closure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.problems.common.forecast_data import Samples, Start, Windows
from pnode_dist.problems.common.forecast_model import ForecastModel, Take
from pnode_dist.problems.qg.physics import QGTendency, SmallScaleFilter

HOUR = 3600.0


class ScaledTendency(nn.Module):
    """The equations for w = q / `scale` and times in hours: dw/dt = 3600 f(q) / scale.

    `equations` are in SI units. `scale` `[layer]` is in 1/s, so that states, loss and gradients are numbers near 1.
    Collective on the partition's communicator.
    """

    scale: torch.Tensor

    def __init__(self, equations: QGTendency, scale: torch.Tensor) -> None:
        super().__init__()
        self.equations = equations
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Return dw/dt in 1/h in the shape of w, `[..., ny_local, nx_local, 2]`; `t` is unused. Collective."""
        rate: torch.Tensor = self.equations(t, w * self.scale)
        return rate * (HOUR / self.scale)

    def closed(self, w: torch.Tensor) -> torch.Tensor:
        """Return the forcing of dq/dt by the closure alone, in 1/s^2 in the shape of w. Collective."""
        q, closure = w * self.scale, self.equations.closure
        return torch.zeros_like(q) if closure is None else closure(q, *self.equations.velocities(q))


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
