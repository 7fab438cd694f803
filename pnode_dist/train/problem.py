"""Interface of a problem, required by the training loop, the gradient check and the evaluation.

A problem is data, a model and a loss over one mesh. A configuration selects it by its `ProblemDefinition`, see
`pnode_dist.config.definition`. Most problems derive from `pnode_dist.ForecastProblem` or
`pnode_dist.TrainableProblem`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.inverse import Inverse, Laplace, Minimum
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.protocol import Partition
from pnode_dist.train.served_model import ServedModel
from pnode_dist.verify.gradcheck import GradcheckCase

Batch = Any
"""Type of the items that a problem's `batches` yields and its `loss` accepts."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """The minimum of a problem's `inverse`, from `first_guess`, and its uncertainty if that was asked for."""

    inverse: Inverse
    first_guess: PETSc.Vec
    minimum: Minimum
    approximation: Laplace | None = None


class Problem(Protocol):
    """Data, model and loss on one mesh."""

    @property
    def name(self) -> str:
        """Short name of the modelled quantity, for tables and plots."""
        ...

    @property
    def units(self) -> str:
        """Units of the validation figures, such as `K`."""
        ...

    @property
    def partition(self) -> Partition:
        """Partition of a state over the state ranks."""
        ...

    @property
    def model(self) -> nn.Module:
        """Model whose `forward(batch)` returns the prediction. Its parameters are the same on every rank."""
        ...

    def batches(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """Yield this replica's share of each training batch of an epoch, except the first `done`.

        The order is determined by (seed, epoch). Every rank yields the same number of shares, and the batches do not
        depend on how the ranks are split into replicas; a share may be empty. A resumed run may start in the middle of
        an epoch. Random draws of batches and loss must therefore come from (seed, epoch), or from the global
        generators of torch, numpy or Python, whose states are stored in snapshots.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Compute this rank's share of the loss. Collective on the world.

        The loss is the sum of the shares over the state ranks, averaged over the replicas.
        `pnode_dist.distributed.gradients.parallel` reduces the gradients in the same way, and `share_of_mean` of that
        module computes the share of a mean.
        `model` is `self.model` or a DistributedDataParallel wrapper of it, and is called as `model(...)`.
        """
        ...

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Compute named errors on the validation data, in `units`, the same on every rank. Collective on the world.

        Training reports the first error, and selects the best parameters by it with `keep = "best"`.
        """
        ...

    def solve_statistics(self) -> SolveStatistics:
        """Return the cost on this rank of the model's last call, and of its backward pass if there was one."""
        ...

    def solve_case(self) -> SolveCase:
        """Return the solve of a training batch, for planning and measurement. Collective on the world."""
        ...

    def gradcheck_case(self) -> GradcheckCase:
        """Return a case for `pnode_dist.verify.gradcheck`. Collective on the world."""
        ...

    def inverse(self) -> Inverse:
        """Return the inverse problem for `invert`, in float64. Collective on the world.

        The table `[inverse]` of the configuration is one of `pnode_dist.config.tables.InverseConfig`.
        """
        ...

    def evaluate_inverse(self, found: Inversion, run_directory: Path) -> dict[str, Any]:
        """Write `analysis.h5` and `report.png` of an inversion to the run directory.

        Returns a JSON-serialisable table of figures, the same on every rank. Collective on the world.
        """
        ...

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Forecast the validation data and write `forecast.h5` and `report.png` to the run directory.

        Returns a JSON-serialisable table of figures, the same on every rank. Collective on the world.
        """
        ...

    def served(self) -> Sequence[ServedModel]:
        """Return the models that `pnode-dist serve` answers requests for; none if empty. Collective on the world."""
        ...
