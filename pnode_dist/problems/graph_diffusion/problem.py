"""The graph diffusion problem: learn how heat flows on an irregular mesh from computed trajectories, follow others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_budget, neural_ode
from pnode_dist.problems.common.trajectories import Windows, windows
from pnode_dist.problems.graph_diffusion.config import DiffusionParameters
from pnode_dist.problems.graph_diffusion.data import MeshData, generate, partitioned_mesh
from pnode_dist.problems.graph_diffusion.forecast_file import Conductivities, Rollouts, write_rollouts
from pnode_dist.problems.graph_diffusion.model import GraphDiffusionModel, LearntFlux, right_hand_side
from pnode_dist.problems.graph_diffusion.physics import Diffusion, Flux
from pnode_dist.report.picture import draw
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.graph_diffusion.config import GraphDiffusionRun

FORECAST, REPORT = "forecast.h5", "report.png"
_TEMPERATURES = 41


def build_graph_diffusion(config: GraphDiffusionRun, mesh: Mesh, dtype: torch.dtype) -> GraphDiffusionProblem:
    """The configured problem with its data, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` on all ranks for whatever the trajectories or the number of ranks do not allow.
    """
    problem = config.problem
    longest = max(config.evaluation.leads)
    if longest >= problem.times:
        raise ConfigurationError(
            f"[evaluation] leads = {list(config.evaluation.leads)}: must be at most {problem.times - 1}, one less than "
            "[problem] times, so that they lie in the validation trajectories"
        )
    check_replicas(config, mesh, problem.trajectories * (problem.times - problem.window))
    nodes, partition = partitioned_mesh(problem, mesh)
    check_budget(config, partition, problem.interval, problem.window)
    data = generate(problem, nodes, partition, mesh)
    diffusion = right_hand_side(config.model, data, config.run.seed, dtype)
    model = GraphDiffusionModel(neural_ode(config, diffusion, partition))
    return GraphDiffusionProblem(config, mesh, data, model, dtype)


@dataclass(frozen=True)
class GraphDiffusionProblem:
    """Computed trajectories, a model of them, and how one is learnt and judged by the other.

    See `pnode_dist.train.problem.Problem`.
    """

    config: GraphDiffusionRun
    mesh: Mesh
    data: MeshData
    model: GraphDiffusionModel
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The problem's name."""
        return "graph_diffusion"

    @property
    def units(self) -> str:
        """Temperatures have no units."""
        return ""

    @property
    def partition(self) -> GraphPartition:
        """How the nodes lie on the state ranks."""
        return self.data.partition

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows]:
        """This replica's training windows of an epoch, shuffled. No window is of a validation trajectory."""
        window, data = self.config.problem.window, self.data.trajectories
        for starts in shared(data.starts(window), self.config, self.mesh, epoch, done):
            yield windows(data, starts, window, self.dtype)

    def loss(self, model: nn.Module, batch: Windows) -> torch.Tensor:
        """This rank's share of the mean square error, in units of the data's scale, over nodes, windows and leads."""
        error: torch.Tensor = model(batch) - batch.targets
        leads, size = batch.targets.shape[:2]
        return share_of_mean(error.square().sum(), leads * size * self.partition.global_shape[0], self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Root mean square errors of rollouts of the validation trajectories from their initial states: over all
        samples, and at each evaluated lead."""
        batch = self._whole_trajectories()
        squares = self._mean_squares(model(batch), batch)
        return {
            "validation_rmse": math.sqrt(squares.mean().item()),
            **{f"lead_{lead}": math.sqrt(squares[lead - 1].item()) for lead in self.config.evaluation.leads},
        }

    def solve_statistics(self) -> SolveStatistics:
        """The counts of the model's last call."""
        return self.model.solve.last_solve

    def solve_case(self) -> SolveCase:
        """The solve of the first training batch."""
        batch = next(self.batches(1))
        return SolveCase(self.model.solve, batch.initial, batch.times)

    def gradcheck_case(self) -> GradcheckCase:
        """The training loss of the first window, as a function of its initial state."""
        batch = windows(self.data.trajectories, [(0, 0)], self.config.problem.window, self.dtype)

        def loss(state: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, initial=state))

        return GradcheckCase(
            batch.initial.clone().requires_grad_(), loss, tuple(self.model.parameters()), self.partition
        )

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """The errors of the model and of two simple forecasts at each lead; writes `forecast.h5` and `report.png`.

        Every validation trajectory is rolled out from its initial state to its last sample. Errors are root mean
        squares over validation trajectories and nodes, of temperatures. Persistence keeps the initial state. Linear
        diffusion knows how the equations depend on the lengths of edges and has one constant conductivity, fitted to
        the training trajectories; it is solved with the model's steps. `heat_drift` is the largest change of a model
        rollout's total heat, relative to it.
        """
        batch = self._whole_trajectories()
        problem, partition = self.config.problem, self.partition
        linear = Diffusion(partition, Flux(DiffusionParameters((self.data.conductivity, 0.0))), self.data.lengths)
        forecasts = {
            "model": model(batch),
            "persistence": batch.initial.expand_as(batch.targets),
            "linear": GraphDiffusionModel(neural_ode(self.config, linear.to(self.dtype), partition))(batch),
        }
        errors = {name: self._mean_squares(value, batch).sqrt() for name, value in forecasts.items()}
        rows = [
            {
                "lead": lead,
                "time": lead * problem.interval,
                **{name: error[lead - 1].item() for name, error in errors.items()},
            }
            for lead in self.config.evaluation.leads
        ]
        samples = f"{problem.times} samples, {problem.interval:g} time units apart"
        result = {
            "nodes": problem.nodes,
            "edges": partition.global_edges,
            "edges_between_ranks": partition.edge_cut,
            "training": f"{problem.trajectories} trajectories of {samples}",
            "validation": f"{problem.validation} trajectories of {samples}, from other initial states",
            "linear_conductivity": self.data.conductivity,
            "rmse": rows,
            "all_leads": {name: math.sqrt(error.square().mean().item()) for name, error in errors.items()},
            "heat_drift": self._heat_drift(forecasts["model"], batch),
        }
        self._write(forecasts, batch, run_directory / FORECAST)
        result["forecast"] = str(run_directory / FORECAST)
        return {**result, "report": draw(run_directory / REPORT, _draw, self.mesh)}

    def _whole_trajectories(self) -> Windows:
        """The validation trajectories, from their initial states on."""
        data = self.data.trajectories
        starts = [(number, 0) for number in range(data.training, len(data.values))]
        return windows(data, starts, data.times - 1, self.dtype)

    def _mean_squares(self, rollout: torch.Tensor, batch: Windows) -> torch.Tensor:
        """The mean square error of each lead `[lead]`, of temperatures. Collective on the state ranks."""
        error = (rollout.detach().double() - batch.targets.double()) * self.data.trajectories.scale
        squares = self.mesh.sum(error.square().sum(dim=(1, 2, 3)), over="state")
        return squares / (len(batch.starts) * self.partition.global_shape[0])

    def _heat_drift(self, rollout: torch.Tensor, batch: Windows) -> float:
        """Collective on the state ranks."""
        states = torch.cat([batch.initial[None], rollout.detach()]).double()
        heat = self.mesh.sum(states.sum(dim=(2, 3)), over="state")
        return float((heat / heat[0] - 1).abs().max())

    def _conductivities(self) -> Conductivities:
        """What was learnt: c l^2 at edges of mean length whose ends are equally warm."""
        diffusion = self.model.solve.func
        assert isinstance(diffusion, Diffusion)
        flux, scale = diffusion.flux.message, self.data.trajectories.scale
        assert isinstance(flux, LearntFlux)
        warmest = self.mesh.max(self.data.trajectories.values.amax() * scale).item()
        temperatures = torch.linspace(0.0, warmest, _TEMPERATURES, dtype=torch.float64)
        ends = (temperatures / scale).unsqueeze(-1).to(self.dtype)
        with torch.no_grad():
            learnt = flux.conductances(ends, ends, torch.tensor([flux.length], dtype=self.dtype)) * flux.length**2
        true = Flux(self.config.problem.parameters).conductivity(temperatures)
        return Conductivities(temperatures, true, learnt.double().squeeze(-1), self.data.conductivity)

    def _write(self, forecasts: dict[str, torch.Tensor], batch: Windows, path: Path) -> None:
        def stored(values: torch.Tensor) -> torch.Tensor:
            whole = torch.cat([batch.initial[None], values.detach()]).double()
            return whole[..., 0].transpose(0, 1) * self.data.trajectories.scale

        contents = Rollouts(
            {"truth": stored(batch.targets), **{name: stored(value) for name, value in forecasts.items()}},
            self.config.problem.interval,
            self.data.mesh,
            self._conductivities(),
        )
        write_rollouts(path, contents, self.partition, self.mesh)


def _draw(path: Path) -> None:
    from pnode_dist.problems.graph_diffusion.plots import draw_report

    draw_report(path, path.with_name(FORECAST), path.with_name("metrics.jsonl"))
