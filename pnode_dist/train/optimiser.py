"""The optimisers that a configuration can choose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pnode_dist.config.tables import TrainingConfig


def optimiser_of(training: TrainingConfig, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """The configured optimiser of `parameters`: AdamW, or stochastic gradient descent with momentum. Not collective."""
    rate, decay = training.learning_rate, training.weight_decay
    match training.optimiser:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=decay)
