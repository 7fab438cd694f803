"""The field problem once more, on the whole field in plain numpy and torch: what the partitioned one must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from tests.unit.problems.field.synthetic_fields import VALIDATION

Array = npt.NDArray[Any]
SECONDS_PER_YEAR = 365.2425 * 86400


def fractions_of_year(stamps: Array) -> Array:
    """The phases of dates in a cycle of one mean Gregorian year that began with the year 2000."""
    years = (stamps - np.datetime64("2000-01-01")) / np.timedelta64(1, "s") / SECONDS_PER_YEAR
    return np.asarray(years % 1.0)


@dataclass(frozen=True)
class PlainField:
    """A whole field `[time, y, x, channel]` in its own units, NaN outside, with its times' phases and mean step."""

    field: Array
    phases: Array
    step: float
    period: float | None
    periodic: tuple[bool, bool]

    @property
    def training(self) -> int:
        return len(self.field) - VALIDATION

    @property
    def inside(self) -> Array:
        return np.asarray(~np.isnan(self.field).all(axis=0).any(axis=-1))

    @property
    def known(self) -> Array:
        """The training times that have values."""
        learnt = self.field[: self.training]
        return np.flatnonzero(~np.isnan(learnt).all(axis=(1, 2, 3)))

    def moments(self) -> tuple[Array, Array]:
        """Mean and standard deviation of each channel over the cells inside and the training times."""
        learnt = self.field[: self.training][:, self.inside]
        return np.nanmean(learnt, axis=(0, 1)), np.nanstd(learnt, axis=(0, 1))

    def normalised(self) -> torch.Tensor:
        mean, deviation = self.moments()
        return torch.from_numpy(np.where(np.isnan(self.field), 0.0, (self.field - mean) / deviation))

    def cycle(self, harmonics: int) -> Array:
        """Coefficients `[1 + 2 harmonics, y, x, channel]` by numpy's least squares: mean, cosines, sines."""
        learnt = self.normalised().numpy()[self.known]
        angle = 2 * np.pi * np.outer(self.phases[self.known], np.arange(1, harmonics + 1))
        design = np.hstack([np.ones((len(learnt), 1)), np.cos(angle), np.sin(angle)])
        solution = np.linalg.lstsq(design, learnt.reshape(len(learnt), -1), rcond=None)[0]
        return np.asarray(solution).reshape(-1, *learnt.shape[1:])

    def forecast(
        self,
        parameters: dict[str, torch.Tensor],
        harmonics: int,
        starts: list[int],
        leads: int,
        substeps: int,
        initial: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RK4 with torch.nn.functional.conv2d on padded fields: `[lead, start, y, x, channel]`, normalised.

        The states at the starts are those of the field, unless `initial` ones `[start, y, x, channel]` are given.
        """
        state = self.normalised()
        coefficients = torch.from_numpy(self.cycle(harmonics))
        inside = torch.from_numpy(self.inside[..., None].astype(float))
        phase0 = torch.from_numpy(self.phases)[starts]
        learnt = torch.stack([self._season(torch.tensor([p]), coefficients)[0] for p in self.phases[self.known]])
        cells = len(self.known) * int(self.inside.sum())
        scale = ((state[self.known] - learnt).square().sum(dim=(0, 1, 2)) / cells).sqrt()

        def tendency(t: float, u: torch.Tensor) -> torch.Tensor:
            phase = phase0 if self.period is None else phase0 + t / self.period
            season = self._season(phase, coefficients)
            # The chain rule by torch, not by the derivative written out.
            rate = torch.zeros_like(season)
            if self.period is not None and harmonics:
                rate = torch.autograd.functional.jvp(  # type: ignore[no-untyped-call]
                    lambda p: self._season(p, coefficients), (phase,), (torch.ones_like(phase) / self.period,)
                )[1]
            departure = u - season
            hidden = self._features(departure / scale, phase, inside, harmonics)
            numbers = sorted({name.split("hidden.")[1].split(".")[0] for name in parameters if "hidden" in name})
            for number in numbers:
                weight, bias = (parameters[f"hidden.{number}.{kind}"] for kind in ("weight", "bias"))
                new = functional.silu(functional.conv2d(self._padded(hidden, weight.shape[-1] // 2), weight, bias))
                hidden = new if number == "0" else hidden + new
            output = hidden.permute(0, 2, 3, 1) @ parameters["output.weight"].T + parameters["output.bias"]
            return rate + inside * (scale * output - parameters["damping"] * departure) / self.step

        u, t, h = state[starts] if initial is None else initial, 0.0, self.step / substeps
        found = []
        for _ in range(leads):
            for _ in range(substeps):
                k1 = tendency(t, u)
                k2 = tendency(t + h / 2, u + h / 2 * k1)
                k3 = tendency(t + h / 2, u + h / 2 * k2)
                k4 = tendency(t + h, u + h * k3)
                u, t = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), t + h
            found.append(u)
        return torch.stack(found)

    def _season(self, phase: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        harmonics = (len(coefficients) - 1) // 2
        season = coefficients[0] + torch.zeros(len(phase), 1, 1, 1)
        for number in range(1, harmonics + 1):
            angle = (2 * torch.pi * number * phase)[:, None, None, None]
            season = season + torch.cos(angle) * coefficients[number]
            season = season + torch.sin(angle) * coefficients[harmonics + number]
        return season

    def _features(
        self, departure: torch.Tensor, phase: torch.Tensor, inside: torch.Tensor, harmonics: int
    ) -> torch.Tensor:
        """The network's inputs `[start, feature, y, x]`: departure, place, mask, season."""
        windows, ny, nx, _ = departure.shape
        land = inside[..., 0].expand(windows, 1, ny, nx)
        planes = [departure.permute(0, 3, 1, 2)]
        if not self.periodic[0]:
            planes.append(torch.linspace(-1, 1, ny, dtype=torch.float64)[:, None] * land)
        if not self.periodic[1]:
            planes.append(torch.linspace(-1, 1, nx, dtype=torch.float64) * land)
        planes.append(land)
        for wave in (torch.cos, torch.sin):
            planes += [wave(2 * torch.pi * n * phase)[:, None, None, None] * land for n in range(1, harmonics + 1)]
        return torch.cat(planes, dim=1)

    def _padded(self, x: torch.Tensor, width: int) -> torch.Tensor:
        rules = ["circular" if periodic else "replicate" for periodic in self.periodic]
        x = functional.pad(x, (width, width, 0, 0), mode=rules[1])
        return functional.pad(x, (0, 0, width, width), mode=rules[0])

    def loss(
        self, parameters: dict[str, torch.Tensor], harmonics: int, starts: list[int], leads: int, substeps: int
    ) -> Any:
        """The mean square error of the windows, over the values inside of all windows, leads and channels."""
        found = self.forecast(parameters, harmonics, starts, leads, substeps)
        state = self.normalised()
        truth = torch.stack([state[[start + lead for start in starts]] for lead in range(1, leads + 1)])
        present = np.stack([~np.isnan(self.field[[start + lead for start in starts]]) for lead in range(1, leads + 1)])
        return (found - truth)[torch.from_numpy(present)].square().mean()
