"""Forecasts as served models: a trained model's forecast as a function of its parameters, or of its initial state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.distributed.sharding import Shard, shards_of
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.autograd.transforms import transforming
from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.forecast_data import Start, windows
from pnode_dist.problems.common.forecast_parts import Parts
from pnode_dist.problems.common.forecast_stream import Streaming
from pnode_dist.train.served_model import Settings, SummedModel, Vectors

MOST_NUMBERS = 100_000
"""Most numbers of a vector in a request or an answer."""
MEANS, STATE = "means", "state"
_OUTPUTS = (MEANS, STATE)
_MOST_SAMPLES, _MOST_MODES, _MODES = 256, 32, 8
_NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class ForecastSource:
    """The initial states of the forecasts that a problem serves.

    `windows(start, leads)` gives the input of the model for one of `starts` held-out initial states: a dataclass with
    the state `initial` `[1, *local_shape]`, of which the model makes `[lead, 1, *local_shape]`. `leads` are the leads
    in samples of an answer by default, `longest` the longest one that can be asked for. `weights` `[*local_shape]` is 0
    where there is never a value; None: everywhere is one. `states()` returns those whose principal components perturb
    an initial state, `[sample, *local_shape]`, float64: `some` of the samples.
    """

    windows: Callable[[int, int], Any]
    starts: int
    leads: tuple[int, ...]
    longest: int
    partition: Partition
    weights: torch.Tensor | None
    states: Callable[[], torch.Tensor]


def some(count: int) -> range:
    """Return at most 256 of so many numbers, at equal distances."""
    return range(0, count, math.ceil(count / _MOST_SAMPLES))


def source_of(parts: Parts, starts: Sequence[Start], leads: tuple[int, ...], dtype: torch.dtype) -> ForecastSource:
    """Return the source of forecasts from the held-out `starts`, solved in `dtype`. Collective on the partition."""
    held_out = parts.held_out
    # Held-out trajectories may be of other numbers, as those of an ensemble are.
    alike = parts.training.partition.global_shape == held_out.partition.global_shape
    samples = parts.training if alike else held_out
    usable = samples.starts(0)
    return ForecastSource(
        lambda start, steps: windows(held_out, starts[start : start + 1], steps, dtype),
        len(starts),
        leads,
        max(leads) if parts.in_time else held_out.length - 1,
        held_out.partition,
        None if held_out.present is None else held_out.present.flatten(0, 1).any(dim=0),
        lambda: torch.stack([samples.values[usable[number]] for number in some(len(usable))]),
    )


def served_forecasts(
    model: nn.Module,
    source: ForecastSource,
    physical: Callable[[torch.Tensor], torch.Tensor],
    no_gradient: str | None = None,
) -> tuple[SummedModel, ...]:
    """Return the models that a forecast serves. Collective on the partition's communicator.

    `physical` converts states to the data's units. `no_gradient` is the reason why the solver has no derivatives.
    """
    arguments = (model, source, physical, no_gradient)
    return ForecastOfParameters(*arguments), ForecastOfInitialState(*arguments)


@dataclass(frozen=True)
class _Asked:
    """The `config` of a request, checked: the start's number, leads in samples, and the kind of output."""

    start: int
    leads: tuple[int, ...]
    output: str


class _Forecast(SummedModel):
    """A forecast at some leads, from one of the held-out initial states.

    The output is one vector, lead after lead: the mean of each channel over the domain (`means`), or the whole state
    (`state`), in the data's units.
    """

    served_name: ClassVar[str]
    own_keys: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model: nn.Module,
        source: ForecastSource,
        physical: Callable[[torch.Tensor], torch.Tensor],
        no_gradient: str | None,
    ) -> None:
        super().__init__(self.served_name, source.partition.comm, no_gradient)
        self._model, self._source, self._physical = model, source, physical
        shape = source.partition.global_shape
        self._channels = shape[-1] if len(shape) > 1 else 1
        self._size = protocol.count(shape)
        weights = torch.ones(source.partition.local_shape) if source.weights is None else source.weights
        self._weights = weights.double().reshape(-1, self._channels)
        self._counts = torch.from_numpy(self.comm.allreduce(self._weights.sum(dim=0).numpy())).clamp(min=1)

    def output_sizes(self, config: Settings) -> Sequence[int]:
        """Return the length of the output."""
        asked = self._asked(config)
        return [len(asked.leads) * (self._size if asked.output == STATE else self._channels)]

    def _asked(self, config: Settings) -> _Asked:
        """Check a `config`. Raises `ConfigurationError`."""
        source = self._source
        known = ("start", "leads", "output", *self.own_keys)
        for key in config:
            if key not in known:
                raise ConfigurationError(f"config: unknown key {key!r}: must be one of {', '.join(known)}")
        start = config.get("start", 0)
        if not _is_between(start, 0, source.starts - 1):
            raise ConfigurationError(f"config: start = {start!r}: must be an integer from 0 to {source.starts - 1}")
        leads = config.get("leads", list(source.leads))
        if not isinstance(leads, list) or not leads or not all(_is_between(one, 1, source.longest) for one in leads):
            raise ConfigurationError(
                f"config: leads = {leads!r}: must be a list of integers from 1 to {source.longest}"
            )
        output = config.get("output", MEANS)
        if output not in _OUTPUTS:
            raise ConfigurationError(f"config: output = {output!r}: must be one of {', '.join(_OUTPUTS)}")
        if output == STATE and self._size * len(leads) > MOST_NUMBERS:
            raise ConfigurationError(
                f"config: output = 'state': has {self._size * len(leads)} numbers: must have at most {MOST_NUMBERS}: "
                "choose fewer leads, or output = 'means'"
            )
        return _Asked(start, tuple(leads), output)

    def _of_lead(self, state: torch.Tensor, output: str) -> torch.Tensor:
        """Return this rank's share of the output at one lead, from the state `[1, *local_shape]`."""
        chosen = self._physical(state).flatten()
        if output == STATE:
            partition = self._source.partition
            every = torch.arange(self._size).reshape(partition.global_shape)
            own = every[partition.owned_slices(self.comm.rank)].flatten()
            return torch.zeros(self._size, dtype=chosen.dtype).index_add(0, own, chosen)
        by_channel = chosen.reshape(-1, self._channels)
        # A value that is never there may be anything, also not a number.
        counted = torch.where(self._weights > 0, by_channel, 0.0)
        return counted.sum(dim=0) / self._counts

    def _outputs(self, asked: _Asked, batch: Any, parameters: Mapping[str, torch.Tensor] | None = None) -> Vectors:
        """Return this rank's share of the output of the forecast of a batch, with other values of parameters."""
        forecast = _Outputs(self._model, asked.leads, partial(self._of_lead, output=asked.output))
        given = {f"model.{name}": value for name, value in (parameters or {}).items()}
        return [torch.func.functional_call(forecast, given, (batch,))]

    def _batch(self, asked: _Asked) -> Any:
        return self._source.windows(asked.start, max(asked.leads))


class ForecastOfParameters(_Forecast):
    """The forecast as a function of the model's parameters, as one vector.

    `config` may choose some of them by name in `parameters`; the others keep their values.
    """

    served_name = "forecast_of_parameters"
    own_keys = ("parameters",)

    def __init__(
        self,
        model: nn.Module,
        source: ForecastSource,
        physical: Callable[[torch.Tensor], torch.Tensor],
        no_gradient: str | None,
    ) -> None:
        super().__init__(model, source, physical, no_gradient)
        shards = shards_of(model)
        self._parameters = {
            name: _Whole(value, shards.get(name)) for name, value in model.named_parameters() if value.requires_grad
        }

    def input_sizes(self, config: Settings) -> Sequence[int]:
        """Return the number of chosen parameters. Raises `ConfigurationError` if there are too many."""
        self._asked(config)
        size = sum(protocol.count(self._parameters[name].shape) for name in self._chosen(config))
        if size > MOST_NUMBERS:
            raise ConfigurationError(
                f"config: the model has {size} parameters: must be at most {MOST_NUMBERS}: choose some by name in "
                "'parameters'"
            )
        return [size]

    def shares(self, inputs: Vectors, config: Settings) -> Vectors:
        """Compute this rank's share of the forecast with the given parameters. Collective on the ranks."""
        asked, names = self._asked(config), self._chosen(config)
        wholes = [self._parameters[name] for name in names]
        parts = torch.split(inputs[0], [protocol.count(whole.shape) for whole in wholes])
        values = {name: whole.own(part) for name, whole, part in zip(names, wholes, parts, strict=True)}
        return self._outputs(asked, self._batch(asked), values)

    def _chosen(self, config: Settings) -> list[str]:
        names = config.get("parameters", list(self._parameters))
        if not isinstance(names, list) or not names or len({*map(str, names)}) < len(names):
            raise ConfigurationError(f"config: parameters = {names!r}: must be a list of different names")
        for name in names:
            if not isinstance(name, str) or name not in self._parameters:
                some = ", ".join(list(self._parameters)[:8])
                raise ConfigurationError(f"config: parameters: unknown name {name!r}: must be one of {some}")
        return names


class ForecastOfInitialState(_Forecast):
    """The forecast as a function of a few coefficients of the initial state.

    The coefficients multiply the leading principal components of the data's states, each of the size of one standard
    deviation, which are added to the start's own state. So 0 is the forecast itself, and the data's spread is a
    standard normal distribution. `config` may give their number in `modes`.
    """

    served_name = "forecast_of_initial_state"
    own_keys = ("modes",)

    def __init__(
        self,
        model: nn.Module,
        source: ForecastSource,
        physical: Callable[[torch.Tensor], torch.Tensor],
        no_gradient: str | None,
    ) -> None:
        super().__init__(model, source, physical, no_gradient)
        self._modes = principal_components(source.states(), source.partition.comm)

    def input_sizes(self, config: Settings) -> Sequence[int]:
        """Return the number of coefficients."""
        self._asked(config)
        return [self._count(config)]

    def shares(self, inputs: Vectors, config: Settings) -> Vectors:
        """Compute this rank's share of the forecast from a perturbed initial state. Collective on the ranks."""
        asked = self._asked(config)
        batch = self._batch(asked)
        perturbation = torch.tensordot(inputs[0], self._modes[: self._count(config)], dims=1)
        initial = batch.initial + perturbation.to(batch.initial.dtype)
        return self._outputs(asked, dataclasses.replace(batch, initial=initial))

    def _count(self, config: Settings) -> int:
        most = len(self._modes)
        count: int = config.get("modes", min(_MODES, most))
        if not _is_between(count, 1, most):
            raise ConfigurationError(f"config: modes = {count!r}: must be an integer from 1 to {most}")
        return count


def principal_components(states: torch.Tensor, comm: MPI.Comm, most: int = _MOST_MODES) -> torch.Tensor:
    """Return the leading principal components `[mode, *local_shape]` of states `[sample, *local_shape]`.

    Their sizes are standard deviations: the covariance of the states is the sum of their outer products. Directions
    without variance are left out, but for the first. Collective.
    """
    flat = states.double().flatten(1)
    flat = flat - flat.mean(dim=0)
    products = comm.allreduce((flat @ flat.T).numpy())
    found: Any = None
    if comm.rank == 0:
        values, vectors = np.linalg.eigh(products)
        kept = max(1, int((values > _NEGLIGIBLE * max(values[-1], 0.0)).sum()))
        vectors = vectors[:, ::-1][:, : min(kept, most)]
        largest = np.abs(vectors).argmax(axis=0)
        found = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    weights = torch.from_numpy(np.ascontiguousarray(comm.bcast(found)))
    modes = weights.T @ flat / math.sqrt(len(flat))
    return modes.reshape(-1, *states.shape[1:])


class _Outputs(nn.Module):
    """The outputs of a model's forecast at some leads, one after the other, without derivatives lead by lead."""

    def __init__(self, model: nn.Module, leads: Sequence[int], output: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.leads, self.output = model, leads, output

    def forward(self, batch: Any) -> torch.Tensor:
        """Return the outputs as one vector."""
        if torch.is_grad_enabled() or transforming() or not isinstance(self.model, Streaming):
            states = self.model(batch)
            return torch.cat([self.output(states[lead - 1]) for lead in self.leads])
        found: dict[int, torch.Tensor] = {}

        def take(lead: int, starts: Sequence[int], state: torch.Tensor) -> None:
            if lead in self.leads:
                found[lead] = self.output(state)

        self.model.stream(batch, take)
        return torch.cat([found[lead] for lead in self.leads])


@dataclass(frozen=True)
class _Whole:
    """A parameter, and the shard of it on this rank if it is sharded."""

    value: torch.Tensor
    shard: Shard | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole parameter."""
        return tuple(self.value.shape) if self.shard is None else self.shard.whole_shape(self.value)

    def own(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a whole parameter that is given as a vector."""
        whole = flat.reshape(self.shape)
        part = whole if self.shard is None else self.shard.part_of(whole)
        return part.to(self.value.dtype)


def _is_between(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
