"""The base of problems that are written as a class: their tables, and what the command line asks of any problem."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.config.definition import ModelTable, ProblemDefinition, ProblemTable, run_type
from pnode_dist.config.tables import Config, Table
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import Inverse, NegativeLogPosterior
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.common.solver import neural_ode
from pnode_dist.report.picture import draw
from pnode_dist.runs.directory import METRICS
from pnode_dist.train.problem import Batch, Inversion
from pnode_dist.train.served_model import ServedModel
from pnode_dist.verify.gradcheck import GradcheckCase

FORECAST, REPORT = "forecast.h5", "report.png"


class TrainableProblem:
    """A problem of one's own, see `pnode_dist.train.problem.Problem`; forecasts derive from `ForecastProblem`.

    A subclass gives `partition`, `model`, `batches`, `loss` and `validation`; `solve_case` and `gradcheck_case` where
    `plan` and `gradcheck` are to work, `inverse` where `invert` is, and `evaluate` and `evaluate_inverse` for figures
    and files of its own. `ProblemConfig`, `ModelConfig`, `EvaluationConfig` and `InverseConfig` are pydantic classes of
    the tables `[problem]`, `[model]`, `[evaluation]` and `[inverse]`; None for the last one refuses that table.

    `config` is the whole configuration, `mesh` the ranks, and `dtype` what the model computes in.
    """

    ProblemConfig: ClassVar[type[Any]] = ProblemTable
    ModelConfig: ClassVar[type[Any]] = ModelTable
    EvaluationConfig: ClassVar[type[Any]] = Table
    InverseConfig: ClassVar[type[Any] | None] = None
    plots: ClassVar[str] = ""
    """The module whose `draw_report(path, forecast, metrics_file, result)` draws the picture of an evaluation."""
    units: str = ""
    """The units of the validation figures, such as `K`."""
    _must_define: ClassVar[tuple[str, ...]] = ("partition", "model", "batches", "loss", "validation")

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype) -> None:
        self.config, self.mesh, self.dtype = config, mesh, dtype

    @classmethod
    def problem_definition(cls) -> ProblemDefinition:
        """The definition by which a configuration finds this class. Raises `ConfigurationError` if it is incomplete."""
        lacking = [name for name in cls._must_define if not cls._defines(name)]
        if lacking:
            raise ConfigurationError(f"{cls.__name__} does not define {' and '.join(lacking)}, which it must")
        description = next(iter((cls.__doc__ or "").strip().splitlines()), "")
        others = {} if cls.InverseConfig is None else {"inverse": cls.InverseConfig}
        run = run_type(cls.__name__, cls._problem_table(), cls.ModelConfig, cls.EvaluationConfig, others)
        return ProblemDefinition(run, cls, description)

    @classmethod
    def _problem_table(cls) -> type[Any]:
        """The class of the table `[problem]`."""
        return cls.ProblemConfig

    @property
    def settings(self) -> Any:
        """The table `[problem]`."""
        return self.config.problem

    @classmethod
    def _defines(cls, name: str) -> bool:
        """Return True if a subclass of the base that demands it gives the method or property."""
        base = next(base for base in cls.__mro__ if "_must_define" in vars(base))
        return any(name in vars(given) for given in cls.__mro__[: cls.__mro__.index(base)])

    @property
    def name(self) -> str:
        """A short name of what is modelled: by default that of the configuration, or the class's in lower case."""
        if ":" not in self.config.kind:
            return self.config.kind
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def partition(self) -> Partition:
        """The distribution of a state over the state ranks."""
        raise NotImplementedError

    @property
    def model(self) -> nn.Module:
        """The model, whose `forward(batch)` is the prediction. It has the same parameters on every rank."""
        raise NotImplementedError

    def neural_ode(self, right_hand_side: Any, partition: Partition | None, **settings: Any) -> NeuralODE:
        """The solve of `right_hand_side` as the tables `[solver]` and `[trajectory]` say."""
        return neural_ode(self.config, right_hand_side, partition, **settings)

    def batches(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """This replica's share of each training batch of an epoch but the first `done`; see `Problem.batches`."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """This rank's share of the loss, see `Problem.loss`. Collective on the world."""
        raise NotImplementedError

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Named errors on the validation data, the same on every rank. Collective on the world."""
        raise NotImplementedError

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call: those of its solves, added up."""
        counted = [module.last_solve for module in self.model.modules() if isinstance(module, NeuralODE)]
        total = counted[0] if counted else SolveStatistics()
        for other in counted[1:]:
            total = total + other
        return total

    def solve_case(self) -> SolveCase:
        """The solve of a training batch, for `plan`. Collective on the world."""
        raise ConfigurationError(f"{self.name}: plan needs {type(self).__name__} to define solve_case")

    def gradcheck_case(self) -> GradcheckCase:
        """A case for `gradcheck`. Collective on the world."""
        raise ConfigurationError(f"{self.name}: gradcheck needs {type(self).__name__} to define gradcheck_case")

    def inverse(self) -> Inverse:
        """The inverse problem for `invert`. Collective on the world."""
        raise ConfigurationError(f"{self.name}: invert needs {type(self).__name__} to define inverse")

    def evaluate_inverse(self, found: Inversion, run_directory: Path) -> dict[str, Any]:
        """The figures of an inversion, for `evaluation.json`: by default those of the minimisation alone."""
        return {"problem": self.name}

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The figures of the trained model, for `evaluation.json`: by default those of `validation`."""
        return {"problem": self.name, "units": self.units, "validation": self.validation(model)}

    def served(self) -> Sequence[ServedModel]:
        """The models that `pnode-dist serve` answers requests for. Collective on the world.

        By default this is the negative log posterior of `inverse` where there is a table `[inverse]`.
        """
        return () if getattr(self.config, "inverse", None) is None else (NegativeLogPosterior(self.inverse()),)

    def illustrated(self, result: Mapping[str, Any], run_directory: Path) -> dict[str, Any]:
        """The table of an evaluation with the place of the file that was written, and of the picture, drawn now.

        Collective on the world.
        """
        told = {**result, "forecast": str(run_directory / FORECAST)}
        return {**told, "report": draw(run_directory / REPORT, lambda path: self.draw(path, told), self.mesh)}

    def draw(self, path: Path, result: Mapping[str, Any]) -> None:
        """Draw the picture of an evaluation, from `forecast.h5` and `metrics.jsonl` beside it. Rank 0 alone."""
        # Needs matplotlib, which may be missing.
        import_module(self.plots).draw_report(path, path.with_name(FORECAST), path.with_name(METRICS), result)
