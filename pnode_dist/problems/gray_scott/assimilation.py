"""The inverse problem of Gray-Scott: the initial state of a trajectory from sparse observations with errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import Control, Gaussian, GridCovariance, Inverse, Observation, Subsample
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.solver import neural_ode
from pnode_dist.problems.common.uncertainty import deviations_of
from pnode_dist.problems.gray_scott.physics import SPECIES, GrayScott
from pnode_dist.report.dataset_file import Variable, write_dataset
from pnode_dist.train.problem import Inversion
from pnode_dist.verify.gradcheck import state_direction

if TYPE_CHECKING:
    from pnode_dist.problems.gray_scott.config import GrayScottRun

_REST = (1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Twin:
    """A trajectory that is known, and what is observed of it.

    `truth` `[time, ny_local, nx_local, 2]` at `times`, float64. `observed` is like it, with NaN where nothing is
    observed.
    """

    partition: GridPartition
    times: tuple[float, ...]
    truth: torch.Tensor
    observed: torch.Tensor
    subsample: Subsample
    last: int

    @property
    def data(self) -> torch.Tensor:
        """This rank's observations `[observed, ny_chosen, nx_chosen, 2]`."""
        return self.subsample(self.observed[1 : self.last + 1])


def twin(config: GrayScottRun, partition: GridPartition, times: Sequence[float], truth: torch.Tensor) -> Twin:
    """Return the observations of `truth`, with errors that depend on the run's seed and global indices alone.

    Raises `ConfigurationError` for more observed samples than there are, or points that are further apart than the
    grid is wide. Collective on the partition's communicator.
    """
    settings = config.inverse
    if settings.observed >= len(times):
        raise ConfigurationError(
            f"[inverse] observed = {settings.observed}: must be at most {len(times) - 1}, one less than [problem] times"
        )
    shortest = min(partition.shape)
    if settings.every > shortest:
        raise ConfigurationError(
            f"[inverse] every = {settings.every}: must be at most {shortest}, the points of the shorter axis"
        )
    subsample = Subsample(partition, settings.every)
    mask = torch.zeros(partition.local_shape, dtype=torch.bool)
    for axis, owned in enumerate(partition.owned):
        places = torch.arange(*owned) % settings.every == 0
        mask = mask | ~places.view([-1 if number == axis else 1 for number in range(mask.dim())])
    errors = settings.noise * state_direction(partition, (len(times),), config.run.seed)
    observed = (truth + errors).masked_fill(mask, math.nan)
    observed[0], observed[settings.observed + 1 :] = math.nan, math.nan
    return Twin(partition, tuple(times), truth, observed, subsample, settings.observed)


def inverse_of(config: GrayScottRun, known: Twin) -> Inverse:
    """Return the inverse problem of the initial state: the equations, the prior, and the observations.

    Collective on the partition's communicator.
    """
    settings, partition = config.inverse, known.partition
    equations = GrayScott(partition, config.problem.parameters)
    prior = GridCovariance(partition, settings.deviation, settings.length, equations.spacing)
    rest = torch.tensor(_REST, dtype=torch.float64).expand(partition.local_shape).clone()
    node = neural_ode(config, equations, partition)
    # In the inner product of the prior, the number of iterations does not grow with the number of grid points.
    control = Control(rest, prior=Gaussian(covariance=prior), inner_product="prior")
    times = known.times[1 : known.last + 1]
    return Inverse(node, [control], [Observation(times, known.subsample, known.data, settings.noise**2)])


def evaluated(config: GrayScottRun, mesh: Mesh, known: Twin, found: Inversion, path: Path) -> dict[str, Any]:
    """Write truth, first guess and analysis to `path`, and return their errors. Collective on the world.

    With a Laplace approximation the file also has the standard deviation of the initial state, and with members the
    spread of a forecast.
    """
    inverse, partition, times = found.inverse, known.partition, known.times
    guess, analysis = (inverse.forecast(m, times).double() for m in (found.first_guess, found.minimum.m))
    deviations, figures = deviations_of(found, times, config.inverse.members, config.run.seed)
    states = {"truth": known.truth, "observed": known.observed, "first_guess": guess, "analysis": analysis}
    axes = zip(partition.axes, partition.shape, config.problem.domain, strict=True)
    write_dataset(
        path,
        {
            "time": Variable(("time",), np.asarray(times)),
            "species": Variable(("species",), np.array(SPECIES)),
            **{axis: Variable((axis,), np.arange(points) * (length / points)) for axis, points, length in axes},
            **{name: _variable(partition, values) for name, values in {**states, **deviations}.items()},
        },
        mesh,
        {"last_observed": known.last},
    )
    errors = {name: _errors(mesh, partition, states[name] - known.truth) for name in ("first_guess", "analysis")}
    rows = [
        {"time": time, "observed": "yes" if 0 < number <= known.last else "no"}
        | {name: values[number] for name, values in errors.items()}
        for number, time in enumerate(times)
    ]
    observations = mesh.sum(torch.tensor(float(known.data.numel())), over="state")
    figures["observations"], figures["controls"] = int(observations.item()), inverse.space.size
    figures["rmse"] = rows
    for name, values in deviations.items():
        figures[f"mean_{name}"] = _errors(mesh, partition, values if values.dim() == 4 else values[None])
    return figures


def _variable(partition: GridPartition, values: torch.Tensor) -> Variable:
    leading = ("time",) if values.dim() > len(partition.local_shape) else ()
    return Variable((*leading, *partition.axes, "species"), values, {}, np.float32, partition)


def _errors(mesh: Mesh, partition: GridPartition, errors: torch.Tensor) -> list[float]:
    """Return the root mean square of each time `[time, *local_shape]`. Collective on the state ranks."""
    squares: torch.Tensor = mesh.sum(errors.square().sum(dim=(1, 2, 3)), over="state")
    return (squares / math.prod(partition.global_shape)).sqrt().tolist()
