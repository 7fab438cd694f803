"""Model of the field problem: a seasonal cycle fitted in each cell, and a learnt tendency of departures from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import Conv2d
from pnode_dist.nn.activation import ACTIVATIONS
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.forecast_model import Take, consumed
from pnode_dist.problems.common.own_times import own_time, slopes
from pnode_dist.problems.common.time_axis import TimeAxis
from pnode_dist.problems.field.config import FieldModelConfig
from pnode_dist.problems.field.data import Field

_DEFAULT_HARMONICS = 2
_FIRST_DAMPING = 0.1
_FIRST_OUTPUT = 0.1
_SMALLEST_EIGENVALUE = 1e-6


@dataclass(frozen=True)
class Windows:
    """A batch of time windows of `steps` steps of the field.

    `initial` `[window, ny_local, nx_local, channel]` are the states at the time indices `starts`, normalised. `phase`
    `[window]` are the positions of these times in the seasonal cycle. `elapsed` `[window, 1 + lead]` are the times
    since each start for unequal steps, else None. States are of the dtype of `initial`.
    """

    field: Field
    starts: tuple[int, ...]
    steps: int
    initial: torch.Tensor
    phase: torch.Tensor
    elapsed: torch.Tensor | None

    @property
    def leads(self) -> range:
        """The leads of the targets: 1, 2, ..."""
        return range(1, self.steps + 1)

    def target(self, lead: int) -> torch.Tensor:
        """Return the states `[window, ny_local, nx_local, channel]` at `lead` steps after the starts."""
        return self._ahead(self.field.values, lead)

    def mask(self, lead: int) -> torch.Tensor | None:
        """Return 1 at a value of `target(lead)` and 0 elsewhere, or None if no value inside is missing."""
        return None if self.field.present is None else self._ahead(self.field.present, lead)

    @cached_property
    def targets(self) -> torch.Tensor:
        """The states at all leads, `[lead, window, ny_local, nx_local, channel]`, made at the first access."""
        return torch.stack([self.target(lead) for lead in self.leads])

    @cached_property
    def present(self) -> torch.Tensor | None:
        """The masks at all leads, shaped like `targets`."""
        found = [mask for mask in map(self.mask, self.leads) if mask is not None]
        return torch.stack(found) if found else None

    def part(self, begin: int, end: int, dtype: torch.dtype) -> Windows:
        """Return the windows `begin` to `end`, in `dtype`."""
        return windows(self.field, self.starts[begin:end], self.steps, dtype)

    def _ahead(self, values: torch.Tensor, lead: int) -> torch.Tensor:
        return values[torch.tensor(self.starts, dtype=torch.int64) + lead].to(self.initial.dtype)


def windows(field: Field, starts: Sequence[int], steps: int, dtype: torch.dtype) -> Windows:
    """Return the windows of `steps` steps that begin at the time indices `starts`."""
    first = torch.tensor(starts, dtype=torch.int64)
    phase = torch.from_numpy(field.time.phases)[first]
    elapsed = None
    if not field.time.regular:
        values = torch.from_numpy(field.time.values)
        later = first.reshape(-1, 1) + torch.arange(steps + 1)
        elapsed = (values[later] - values[first].reshape(-1, 1)).to(dtype)
    return Windows(field, tuple(starts), steps, field.values[first].to(dtype), phase.to(dtype), elapsed)


def number_of_harmonics(model: FieldModelConfig, time: TimeAxis, known: Sequence[int]) -> int:
    """Return the configured number of harmonics of the seasonal cycle, by default 2 with a cycle and 0 without.

    Raises `ConfigurationError` if there is no cycle, or if the training times `known`, those with values, are too few
    to determine the harmonics.
    """
    harmonics = model.harmonics
    if harmonics is None:
        harmonics = 0 if time.period is None else _DEFAULT_HARMONICS
    if harmonics and time.period is None:
        raise ConfigurationError(
            f"[model] harmonics = {harmonics}: must be 0, as the times are no dates and [problem] period is not set"
        )
    steps_per_cycle = math.inf if time.period is None else round(time.period / time.step)
    if 2 * harmonics >= steps_per_cycle:
        raise ConfigurationError(
            f"[model] harmonics = {harmonics}: must be below half of the {steps_per_cycle} steps in a cycle"
        )
    design = _harmonic_basis(torch.from_numpy(time.phases[list(known)]), harmonics)
    if np.linalg.matrix_rank(design.numpy(), rtol=1e-3) < design.shape[1]:
        raise ConfigurationError(
            f"[model] harmonics = {harmonics}: too many to be told apart by the {len(known)} training times: use fewer"
        )
    return harmonics


def _harmonic_basis(phase: torch.Tensor, harmonics: int) -> torch.Tensor:
    """Return 1, cos and sin of each harmonic at the phases `[...]`: `[..., 1 + 2 harmonics]`."""
    numbers = torch.arange(1, harmonics + 1, dtype=phase.dtype, device=phase.device)
    angles = 2 * math.pi * phase.unsqueeze(-1) * numbers
    return torch.cat([torch.ones_like(phase).unsqueeze(-1), torch.cos(angles), torch.sin(angles)], dim=-1)


class SeasonalCycle(nn.Module):
    """Mean and `harmonics` harmonics of the cycle in each cell, by least squares over the training part.

    Each rank fits the cells it owns. Phases are counted in cycles.
    """

    coefficients: torch.Tensor

    def __init__(self, field: Field, harmonics: int) -> None:
        super().__init__()
        self.harmonics = harmonics
        design = _harmonic_basis(torch.from_numpy(field.time.phases[: field.training]), harmonics)
        learnt = field.values[: field.training]
        if field.present is None:
            coefficients = torch.tensordot(torch.linalg.pinv(design), learnt, dims=1)
        else:
            coefficients = _fit_where_present(design, learnt, field.present[: field.training])
        self.register_buffer("coefficients", coefficients, persistent=False)

    def forward(self, phase: torch.Tensor) -> torch.Tensor:
        """Return the state of the cycle at the phases `[window]`: `[window, ny_local, nx_local, channel]`."""
        state: torch.Tensor = torch.tensordot(_harmonic_basis(phase, self.harmonics), self.coefficients, dims=1)
        return state

    def derivative(self, phase: torch.Tensor) -> torch.Tensor:
        """Return the derivative of the state with respect to the phase, in the same shape."""
        numbers = 2 * math.pi * torch.arange(1, self.harmonics + 1, dtype=phase.dtype, device=phase.device)
        angles = phase.unsqueeze(-1) * numbers
        basis = torch.cat([-numbers * torch.sin(angles), numbers * torch.cos(angles)], dim=-1)
        rate: torch.Tensor = torch.tensordot(basis, self.coefficients[1:], dims=1)
        return rate


def _fit_where_present(design: torch.Tensor, learnt: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Fit each cell by least squares over its present values. Too few values give the minimum-norm solution."""
    normal = torch.einsum("tp,tq,tyxc->yxcpq", design, design, present)
    moments = torch.einsum("tp,tyxc->yxcp", design, learnt)
    inverse = torch.linalg.pinv(normal, rtol=_SMALLEST_EIGENVALUE, hermitian=True)
    solution: torch.Tensor = inverse @ moments.unsqueeze(-1)
    return solution.squeeze(-1).movedim(-1, 0).contiguous()


class Tendency(nn.Module):
    """du/dt = dS/dt + (s N(a / s, season, place) - c a) / step, with the departure a = u - S(t) from the cycle S.

    N is a residual stack of convolutions, s the departures' standard deviation over the training part, c a learnt rate
    of damping for each channel, and `step` the time between two states of the data. The rate is 0 outside the mask.
    Collective on the partition's communicator.
    """

    inside: torch.Tensor
    place: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, config: FieldModelConfig, field: Field, partition: GridPartition, mesh: Mesh, harmonics: int
    ) -> None:
        super().__init__()
        self.cycle = SeasonalCycle(field, harmonics)
        self.step = field.time.step
        self.interval = field.time.interval
        self.period = field.time.period
        self.activation = ACTIVATIONS[config.activation]
        self.register_buffer("inside", field.inside, persistent=False)
        self.register_buffer("place", _place(partition) * field.inside, persistent=False)
        self.register_buffer("scale", _departure_deviation(self.cycle, field, mesh), persistent=False)
        channels, width = field.channels, config.channels
        inputs = channels + self.place.shape[-1] + 1 + 2 * harmonics
        widths = [inputs] + [width] * len(config.dilations)
        self.hidden = nn.ModuleList(
            Conv2d(partition, before, width, config.kernel_size, dilation, dtype=torch.float64)
            for before, dilation in zip(widths, config.dilations, strict=False)
        )
        self.output = nn.Linear(width, channels, dtype=torch.float64)
        self.damping = nn.Parameter(torch.full((channels,), _FIRST_DAMPING, dtype=torch.float64))
        with torch.no_grad():
            # Damping alone is a fair forecast, so the network starts as a small correction to it.
            self.output.weight.mul_(_FIRST_OUTPUT)
            self.output.bias.zero_()

    def forward(
        self,
        t: torch.Tensor,
        u: torch.Tensor,
        start_phase: torch.Tensor,
        elapsed: torch.Tensor | None = None,
        slope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return du/dt `[window, ny_local, nx_local, channel]` at the time `t` since each window's start.

        `start_phase` `[window]` is the position of each start in the seasonal cycle.

        With `elapsed` and its `slope`, `t` is the common clock of `own_times`, and u is differentiated with respect to
        that clock.
        """
        if elapsed is not None and slope is not None:
            time, advance = own_time(t, elapsed, slope, self.interval)
            return self._rate(time, u, start_phase) * advance[:, None, None, None]
        return self._rate(t, u, start_phase)

    def _rate(self, t: torch.Tensor, u: torch.Tensor, start_phase: torch.Tensor) -> torch.Tensor:
        phase, cycle_rate = start_phase, torch.zeros_like(u)
        if self.period is not None:
            phase = start_phase + t / self.period
            cycle_rate = self.cycle.derivative(phase) / self.period
        departure = u - self.cycle(phase)
        correction = self.scale * self._network(departure / self.scale, phase)
        rate: torch.Tensor = cycle_rate + self.inside * (correction - self.damping * departure) / self.step
        return rate

    def _network(self, departure: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        grid = departure.shape[:-1]
        season = _harmonic_basis(phase, self.cycle.harmonics)[:, None, None, :] * self.inside
        x = torch.cat([departure, self.place.expand(*grid, -1), season], dim=-1)
        for number, layer in enumerate(self.hidden):
            y = self.activation(layer(x))
            x = y if number == 0 else x + y
        result: torch.Tensor = self.output(x)
        return result


def _place(partition: GridPartition) -> torch.Tensor:
    """Return the position of each cell, `[ny_local, nx_local, features]`: -1 to 1 along each bounded axis.

    All positions of a periodic axis are equivalent, so it has no feature.
    """
    features = []
    for axis, (start, stop) in enumerate(partition.owned):
        if partition.boundary[axis] != "periodic":
            along = torch.linspace(-1, 1, partition.shape[axis], dtype=torch.float64)[start:stop]
            features.append(
                along.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1)).expand(*partition.local_shape[:2], 1)
            )
    return torch.cat(features, dim=-1) if features else torch.empty(*partition.local_shape[:2], 0, dtype=torch.float64)


def _departure_deviation(cycle: SeasonalCycle, field: Field, mesh: Mesh) -> torch.Tensor:
    """Return the standard deviation `[channel]` of the training part from the cycle, over all ranks, with 1 for 0."""
    phases = torch.from_numpy(field.time.phases[: field.training])
    departures = field.values[: field.training] - cycle(phases)
    if field.present is not None:
        departures = departures * field.present[: field.training]
    squares = mesh.sum(departures.square().sum(dim=(0, 1, 2)), over="state")
    deviation = (squares / field.counts[: field.training].sum(dim=0)).sqrt()
    return torch.where(deviation > 0, deviation, torch.ones_like(deviation))


class FieldModel(nn.Module):
    """Forecast model: `model(windows)` returns normalised states `[lead, window, ny_local, nx_local, channel]`.

    `solve` is the NeuralODE over the windows. Collective on the partition's communicator.
    """

    def __init__(self, solve: NeuralODE, interval: float) -> None:
        super().__init__()
        self.solve = solve
        self.interval = interval

    def forward(self, batch: Windows) -> torch.Tensor:
        """Return the states at the leads 1, 2, ... of the windows' targets."""
        states = self.solve(batch.initial, self.times(batch), *self.arguments(batch))
        forecast: torch.Tensor = states[1:]
        return forecast

    def stream(self, batch: Windows, take: Take) -> None:
        """Hand the states of each lead to `take` while the solve goes on, in place of `forward`. No gradient."""
        with consumed(self.solve, range(len(batch.starts)), take):
            self.solve(batch.initial, self.times(batch), *self.arguments(batch))

    def times(self, batch: Windows) -> list[float]:
        """Return the output times of the windows' solve, since the start or on the common clock."""
        return [number * self.interval for number in range(batch.steps + 1)]

    def arguments(self, batch: Windows) -> tuple[torch.Tensor, ...]:
        """Return the arguments of the right-hand side besides time and state."""
        if batch.elapsed is None:
            return (batch.phase,)
        return batch.phase, batch.elapsed, slopes(batch.elapsed, self.interval)
