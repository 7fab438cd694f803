"""Configured optimiser and learning-rate schedule."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from pnode_dist.distributed.sharding import shards_of
from pnode_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from pnode_dist.config.tables import TrainingConfig


def optimiser_of(training: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Create the configured optimiser of the model's parameters: AdamW, SGD with momentum, or one by import path.

    Raises `ConfigurationError` if the path names no optimiser, if the optimiser does not accept its options, or if it
    needs the whole gradient while parameters are sharded. Not collective.
    """
    rate, decay, parameters = training.learning_rate, training.weight_decay, list(model.parameters())
    match training.optimiser:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=decay)
        case path:
            kind = _imported("optimiser", path, torch.optim.Optimizer)
    arguments = {"lr": rate, **({"weight_decay": decay} if decay else {}), **training.optimiser_options}
    optimiser: torch.optim.Optimizer = _called("optimiser", path, kind, (parameters,), arguments)
    if needs_closure(optimiser) and shards_of(model):
        raise ConfigurationError(
            f'[training] optimiser = "{path}": works on the whole gradient, and the model has sharded parameters'
        )
    return optimiser


def schedule_of(training: TrainingConfig, optimiser: torch.optim.Optimizer) -> LRScheduler | None:
    """Create the configured schedule; None for a constant learning rate.

    Raises `ConfigurationError` if the path names no scheduler, or if the scheduler does not accept its options.
    """
    match training.schedule:
        case "constant":
            return None
        case "cosine":
            return CosineAnnealingLR(optimiser, T_max=training.epochs)
        case path:
            kind = _imported("schedule", path, LRScheduler)
    found: LRScheduler = _called("schedule", path, kind, (optimiser,), training.schedule_options)
    return found


def check(training: TrainingConfig, model: nn.Module) -> None:
    """Raise `ConfigurationError` if the configured optimiser or schedule cannot be created. Has no side effects."""
    schedule_of(training, optimiser_of(training, model))


def needs_closure(optimiser: torch.optim.Optimizer) -> bool:
    """Return True if the optimiser evaluates the loss itself, as LBFGS does."""
    closure = inspect.signature(optimiser.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def follows_validation(schedule: LRScheduler | None) -> bool:
    """Return True if the schedule is stepped with a validation figure."""
    return isinstance(schedule, ReduceLROnPlateau)


def follow_longer_run(schedule: LRScheduler | None, optimiser: torch.optim.Optimizer, epochs: int) -> None:
    """Set the learning rate to its value in a run of `epochs` epochs, after a change of the configured length.

    Only the cosine schedule depends on the length of the run.
    """
    if not isinstance(schedule, CosineAnnealingLR) or schedule.T_max == epochs:
        return
    schedule.T_max = epochs
    share = (1 + math.cos(math.pi * schedule.last_epoch / schedule.T_max)) / 2
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * share


def _imported(key: str, path: str, kind: type) -> type[Any]:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f'[training] {key} = "{path}": cannot be imported: {error}') from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigurationError(f'[training] {key} = "{path}": must be a subclass of torch\'s {kind.__name__}')
    return found


def _called(key: str, path: str, kind: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
    try:
        return kind(*positional, **named)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f'[training] {key} = "{path}" with {key}_options: {error}') from None
