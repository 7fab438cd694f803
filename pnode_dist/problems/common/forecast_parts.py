"""The two parts of a forecast's data, to learn from and held out, and the units of the states that are solved for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_data import Samples


@dataclass(frozen=True)
class Scaling:
    """Units of the states that are solved for: a state is (value - `offset`) / `scale`, both `[channel]` or `[]`."""

    offset: torch.Tensor
    scale: torch.Tensor

    def states(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the data as states."""
        return (values - self.offset) / self.scale

    def physical(self, states: torch.Tensor) -> torch.Tensor:
        """States in the data's units, in float64."""
        return states.double() * self.scale + self.offset


@dataclass(frozen=True)
class Parts:
    """Training and validation samples, whether they are split in time, and the units of both if not the data's."""

    training: Samples
    held_out: Samples
    in_time: bool
    scaling: Scaling | None = None

    def scaled(self, scaling: Scaling | None) -> Parts:
        """The parts as states in the units of `scaling`; missing values stay zero."""
        if scaling is None:
            return self
        return replace(
            self, training=_scaled(self.training, scaling), held_out=_scaled(self.held_out, scaling), scaling=scaling
        )


def _scaled(samples: Samples, scaling: Scaling) -> Samples:
    states = scaling.states(samples.values)
    return replace(samples, values=states if samples.present is None else states.masked_fill(~samples.present, 0.0))


def split(whole: Samples, held_out: int | None, window: int) -> Parts:
    """The last `held_out` trajectories held out, or the last times of a single one; None: a fifth of them.

    Raises `ConfigurationError` where what is left to learn from holds no window.
    """
    in_time = whole.count == 1
    total = whole.length if in_time else whole.count
    held_out = max(total // 5, 1) if held_out is None else held_out
    least = window + 1 if in_time else 1
    if held_out > total - least:
        what = "times" if in_time else "trajectories"
        raise ConfigurationError(
            f"[problem] validation = {held_out}: must be at most {total - least}, which leaves {least} of the "
            f"{total} {what} to learn from"
        )
    learnt = total - held_out
    if in_time:
        # The last training time is the first start of a forecast.
        return Parts(whole.part(0, learnt), whole.part(learnt - 1, total), in_time)
    return Parts(whole.trajectories(0, learnt), whole.trajectories(learnt, total), in_time)


def moments(samples: Samples, mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each entry along the last axis, over all else; of all entries of a vector.

    A deviation of zero is given as 1. Collective on the state ranks.
    """
    by_channel = len(samples.partition.global_shape) > 1
    axes = tuple(range(samples.values.dim() - 1 if by_channel else samples.values.dim()))
    present = torch.ones_like(samples.values) if samples.present is None else samples.present.double()
    count = mesh.sum(present.sum(dim=axes), over="state").clamp(min=1)
    mean = mesh.sum((samples.values * present).sum(dim=axes), over="state") / count
    squares = mesh.sum((((samples.values - mean) * present).square()).sum(dim=axes), over="state") / count
    deviation = squares.sqrt()
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))
