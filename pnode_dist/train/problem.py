"""What the training loop, the gradient check and the evaluation ask of a problem.

A problem is data, a model and a loss over one mesh. A configuration finds it by its `ProblemDefinition`, see
`pnode_dist.config.definition`. Most derive from `pnode_dist.ForecastProblem` or `pnode_dist.TrainableProblem`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.protocol import Partition
from pnode_dist.verify.gradcheck import GradcheckCase

Batch = Any
"""Whatever a problem's `batches` yields and its `loss` takes."""


class Problem(Protocol):
    """Data, model and loss on one mesh."""

    @property
    def name(self) -> str:
        """A short name of what is modelled, for tables and plots."""
        ...

    @property
    def units(self) -> str:
        """The units of the validation figures, such as `K`."""
        ...

    @property
    def partition(self) -> Partition:
        """How a state lies on the state ranks."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model, whose `forward(batch)` is the prediction. It has the same parameters on every rank."""
        ...

    def batches(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """This replica's share of each training batch of an epoch but the first `done`, in an order that (seed, epoch)
        fixes.

        As many on every rank, and the same batches however the ranks are split; a share may be empty. A run that is
        resumed goes on in the middle of an epoch: what batches and loss draw at random comes from (seed, epoch) or from
        torch's, numpy's or Python's own generator, whose states are kept.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """This rank's share of the loss. Collective on the world.

        The loss is the sum over the state ranks and the mean over the replicas of the shares, which
        `pnode_dist.distributed.gradients.parallel` makes of their gradients. `share_of_mean` of the same module makes
        the share of a mean.
        `model` is `self.model` or DistributedDataParallel around it, and is called as `model(...)`.
        """
        ...

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Named errors on the validation data, in `units`, the same on every rank. Collective on the world.

        The first is the one that training reports, and by which the best parameters are chosen if that is asked for.
        """
        ...

    def solve_statistics(self) -> SolveStatistics:
        """What the model's last call, and its backward pass if there was one, cost on this rank."""
        ...

    def solve_case(self) -> SolveCase:
        """The solve of a training batch, to plan and to measure with. Collective on the world."""
        ...

    def gradcheck_case(self) -> GradcheckCase:
        """A case for `pnode_dist.verify.gradcheck`. Collective on the world."""
        ...

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Forecast the validation data, write `forecast.h5` and `report.png` into the run directory.

        Returns the table of figures, which JSON can hold, the same on every rank. Collective on the world.
        """
        ...
