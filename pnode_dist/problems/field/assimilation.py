"""The inverse problem of a field: the state at one time of the validation part from sparse observations with errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import Control, Gaussian, GridCovariance, Inverse, Observation
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.solver import neural_ode
from pnode_dist.problems.common.uncertainty import deviations_of
from pnode_dist.problems.field.data import Field
from pnode_dist.problems.field.forecast_file import write_states
from pnode_dist.problems.field.model import FieldModel, SeasonalCycle, windows
from pnode_dist.train.problem import Inversion
from pnode_dist.verify.gradcheck import state_direction

if TYPE_CHECKING:
    from pnode_dist.problems.field.config import FieldRun

FORECASTS = ("first_guess", "analysis", "persistence")


@dataclass(frozen=True, eq=False)
class Known:
    """A window of the field, and what is observed of it.

    `indices` are the time indices of the field, `times` those of the solve. `truth` and `observed` are normalised,
    `[time, ny_local, nx_local, channel]`, float64; `observed` is NaN where nothing is observed. `compared` has their
    shape. It is 1 at values in cells that are not observed at any time, else 0. `last` is the last observed sample.
    """

    partition: GridPartition
    indices: tuple[int, ...]
    times: tuple[float, ...]
    truth: torch.Tensor
    observed: torch.Tensor
    compared: torch.Tensor
    last: int


class OneWindow(nn.Module):
    """The tendency of one state `[ny_local, nx_local, channel]`, for the window of `arguments`.

    Values outside the mask are taken as 0, whatever the state holds there, so that nothing depends on them.
    """

    inside: torch.Tensor

    def __init__(self, tendency: nn.Module, inside: torch.Tensor, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.tendency, self._arguments = tendency, tuple(arguments)
        self.register_buffer("inside", inside, persistent=False)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return du/dt `[ny_local, nx_local, channel]`."""
        rate: torch.Tensor = self.tendency(t, (u * self.inside)[None], *self._arguments)[0]
        return rate


class Entries:
    """The entries `places` of this rank's part of a state, flat."""

    def __init__(self, places: torch.Tensor) -> None:
        self._places = places

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """Return the entries `[len(places)]`."""
        return state.reshape(-1)[self._places]


def known_window(config: FieldRun, field: Field, model: FieldModel, partition: GridPartition, mesh: Mesh) -> Known:
    """Return the configured window and its observations, with errors that depend on the seed and global indices alone.

    Raises `ConfigurationError` for a window that leaves the validation part, and for cells that are further apart than
    the grid is wide, or all outside the mask or without values. Collective on the state ranks.
    """
    settings, problem = config.inverse, config.problem
    length = settings.observed + settings.forecast
    if settings.start + length > problem.validation:
        raise ConfigurationError(
            f"[inverse] start + observed + forecast = {settings.start + length}: must be at most [problem] validation "
            f"= {problem.validation}, so that the window lies in the validation part"
        )
    shortest = min(partition.shape)
    if settings.every > shortest:
        raise ConfigurationError(
            f"[inverse] every = {settings.every}: must be at most {shortest}, the cells of the shorter axis"
        )
    first = field.training + settings.start
    indices = tuple(range(first, first + length))
    truth = field.values[first : first + length]
    present = (field.inside if field.present is None else field.present[first : first + length]).expand_as(truth) > 0
    chosen = torch.ones(partition.local_shape, dtype=torch.bool)
    for axis, owned in enumerate(partition.owned):
        places = torch.arange(*owned) % settings.every == 0
        chosen = chosen & places.view([-1 if number == axis else 1 for number in range(chosen.dim())])
    seen = present & chosen
    seen[settings.observed :] = False
    if not mesh.sum(torch.tensor(float(seen.sum())), over="state"):
        raise ConfigurationError(
            f"[inverse] every = {settings.every}, observed = {settings.observed}: choose no cell that has a value"
        )
    errors = settings.noise / field.figure_scale * state_direction(partition, (length,), config.run.seed)
    observed = (truth + errors).masked_fill(~seen, math.nan)
    times = tuple(model.times(windows(field, [first], length - 1, torch.float64)))
    compared = (present & ~seen.any(dim=0)).double()
    return Known(partition, indices, times, truth, observed, compared, settings.observed - 1)


def inverse_of(config: FieldRun, field: Field, model: FieldModel, known: Known) -> Inverse:
    """Return the inverse problem of the window's initial state: the model, the prior, and the observations.

    The prior leaves cells outside the mask at 0. Collective on the partition's communicator.
    """
    settings, partition = config.inverse, known.partition
    tendency: Any = model.solve.func
    batch = windows(field, known.indices[:1], len(known.indices) - 1, torch.float64)
    right_hand_side: Function = OneWindow(tendency, field.inside, model.arguments(batch))
    node = neural_ode(config, right_hand_side, partition)
    guess = _cycle_state(tendency.cycle, batch.phase)
    prior = GridCovariance(
        partition,
        (settings.deviation / field.figure_scale).tolist(),
        length=1.0,
        spacing=[1 / cells for cells in settings.length],
        inside=field.inside[..., 0] > 0,
    )
    # In the inner product of the prior, the number of iterations does not grow with the number of cells.
    control = Control(guess, prior=Gaussian(covariance=prior), inner_product="prior")
    variance = (settings.noise / field.figure_scale).square().expand(partition.local_shape).reshape(-1)
    observations = []
    for time, values in zip(known.times, known.observed[: known.last + 1], strict=False):
        flat = values.reshape(-1)
        places = torch.nonzero(flat.isfinite()).flatten()
        observations.append(Observation(time, Entries(places), flat[places], variance[places]))
    return Inverse(node, [control], observations)


def evaluated(config: FieldRun, field: Field, mesh: Mesh, known: Known, found: Inversion, path: Path) -> dict[str, Any]:
    """Write truth, first guess and analysis to `path`, and return their errors. Collective on the world.

    Errors are those of `FieldProblem.evaluate`, in cells that are not observed at any time. Persistence repeats the
    last field before the window that lacks no value, in all cells. With a Laplace approximation the file also has the
    standard deviation of the initial state, and with members the spread of a forecast.
    """
    inverse, partition, times = found.inverse, known.partition, known.times
    before = torch.nonzero(field.complete[: known.indices[0]]).flatten()
    guess, analysis = (inverse.forecast(m, times).double() for m in (found.first_guess, found.minimum.m))
    states = {
        "first_guess": guess,
        "analysis": analysis,
        "persistence": field.values[before[-1]].expand_as(known.truth),
    }
    deviations, figures = deviations_of(found, times, config.inverse.members, config.run.seed)
    outside = field.inside == 0
    missing = outside if field.present is None else field.present[list(known.indices)] == 0
    truth = field.physical(known.truth).masked_fill(missing, math.nan)
    stored = {"truth": truth, "observed": field.physical(known.observed)}
    stored |= {name: field.physical(state).masked_fill(outside, math.nan) for name, state in states.items()}
    stored |= {name: (values * field.deviation).masked_fill(outside, math.nan) for name, values in deviations.items()}
    attributes = {"title": f"Analysis of {field.name}", "last_observed": known.last, "time_step": field.time.step_name}
    write_states(path, field, known.indices, stored, attributes, partition, mesh)
    terms = mesh.sum(known.compared.sum(dim=(1, 2, 3)), over="state")

    def errors(difference: torch.Tensor) -> list[float]:
        squares = (difference * field.figure_scale * known.compared).square().sum(dim=(1, 2, 3))
        return (mesh.sum(squares, over="state") / terms).sqrt().tolist()

    roots = {name: errors(state - known.truth) for name, state in states.items()}
    figures["variable"], figures["units"] = field.name, field.units
    figures["observations"] = int(mesh.sum(known.observed.isfinite().sum(), over="state").item())
    figures["compared"], figures["controls"] = int(terms[0].item()), inverse.space.size
    figures["persistence_of"] = field.time.label(int(before[-1]))
    figures["rmse"] = [
        {"time": field.time.label(index), "observed": "yes" if number <= known.last else "no"}
        | {name: roots[name][number] for name in FORECASTS}
        for number, index in enumerate(known.indices)
    ]
    for name, values in deviations.items():
        spreads = errors(values.expand_as(known.truth))
        figures[f"mean_{name}"] = spreads if name == "deviation" else spreads[:1]
    return figures


def _cycle_state(cycle: SeasonalCycle, phase: torch.Tensor) -> torch.Tensor:
    state: torch.Tensor = cycle(phase)[0]
    return state.detach().clone()
