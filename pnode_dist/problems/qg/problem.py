"""Quasi-geostrophic problem: learn the forcing of a coarse model by the scales that it does not resolve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition import protocol
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.batches import shared
from pnode_dist.problems.common.computed_problem import ComputedProblem
from pnode_dist.problems.common.forecast_data import Samples, SplitData, Start, Windows, windows
from pnode_dist.problems.common.forecast_parts import Scaling, moments
from pnode_dist.problems.common.forecast_stream import Forecast
from pnode_dist.problems.common.trainable import FORECAST
from pnode_dist.problems.qg.baselines import PUBLISHED
from pnode_dist.problems.qg.closures import Scales, closure, scales_of
from pnode_dist.problems.qg.config import is_multiple
from pnode_dist.problems.qg.data import FineRuns, partition_of
from pnode_dist.problems.qg.evaluation import Run, evaluated
from pnode_dist.problems.qg.free_runs import HOURS, free_run
from pnode_dist.problems.qg.model import HOUR, ForcingBatch, QGModel, ScaledTendency, StepClosure
from pnode_dist.problems.qg.physics import LAYERS, Closure, QGTendency, ResolvedWaves, SmallScaleFilter, initial_state
from pnode_dist.report.picture import draw
from pnode_dist.runs.directory import FREE_RUNS

if TYPE_CHECKING:
    from pnode_dist.problems.qg.config import QGRun

_FCNN_HALO, _KERNEL = 2, 3


class QGProblem(ComputedProblem):
    """Learn the sub-grid forcing of two-layer quasi-geostrophic turbulence, through the solve or from the forcing.

    States are potential vorticity of the coarse grid in standard deviations of each layer, and times are in hours.
    After each step of the solve the filter of small scales is applied.
    """

    config: QGRun
    plots = "pnode_dist.problems.qg.plots"
    partition: GridPartition
    units = "standard deviations"
    stores_baselines = True

    def build_partition(self) -> GridPartition:
        """Partition the coarse grid into slabs along y. Collective on the state ranks."""
        try:
            partition_of(self.mesh, self.config.problem.fine)
            return partition_of(self.mesh, self.config.problem.shape, self._halo)
        except ConfigurationError as error:
            raise ConfigurationError(f"[mesh] state = {self.mesh.state_ranks}: {error}") from None

    @property
    def _halo(self) -> int:
        """The widest halo of the closure."""
        model = self.config.model
        return _FCNN_HALO if model.closure == "fcnn" else max((model.kernel or _KERNEL) // 2, 1)

    @cached_property
    def trajectories(self) -> tuple[torch.Tensor, torch.Tensor]:
        """q in 1/s and sub-grid forcing in 1/s^2, `[trajectory, time, *local_shape]`. Collective on the world."""
        return FineRuns(self.config.problem, self.partition, self.mesh).trajectories()

    @classmethod
    def planned(cls, config: QGRun, mesh: Mesh, dtype: torch.dtype) -> QGProblem:
        """Build the problem with noise in place of the fine runs, for `pnode-dist plan`. Collective on the world."""
        problem, batch = config.problem, config.training.batch_size
        few = {"trajectories": 1, "validation": 1, "times": problem.window + batch}
        changed = {
            "problem": problem.model_copy(update=few),
            "evaluation": config.evaluation.model_copy(update={"leads": (1,)}),
        }
        return PlannedQG(config.model_copy(update=changed), mesh, dtype)

    def load_data(self) -> SplitData:
        """Read or compute all trajectories. Collective on the world."""
        problem = self.config.problem
        q, _ = self.trajectories
        cell = problem.parameters.L / problem.shape[1]
        axes = zip(self.partition.axes, problem.shape, strict=True)
        return self.split_data(
            q[: problem.trajectories],
            q[problem.trajectories :],
            local=True,
            units="1/s",
            dimensions=(*self.partition.axes, "layer"),
            names=LAYERS,
            coordinates={axis: np.arange(points) * cell for axis, points in axes},
        )

    def build_scaling(self, learnt: Samples) -> Scaling:
        """Scale by the standard deviation of each layer. Raises `ConfigurationError` for a layer at rest."""
        _, deviation = moments(learnt, self.mesh)
        return Scaling(torch.zeros(len(LAYERS), dtype=torch.float64), deviation)

    @cached_property
    def resolved(self) -> ResolvedWaves:
        """The projection on the waves in which states are compared.

        Each step of the coarse model damps the others, and the filtered truth still has them.
        """
        return ResolvedWaves(self.partition)

    @cached_property
    def change(self) -> torch.Tensor:
        """The root mean square change of each layer's resolved waves from sample to sample, `[layer]`, scaled."""
        changes = self.resolved(self.samples.values.diff(dim=1))
        squares = self.mesh.sum(changes.square().sum(dim=(0, 1, 2, 3)), over="state")
        change: torch.Tensor = (squares / (math.prod(changes.shape[:2]) * math.prod(self.partition.shape))).sqrt()
        return change

    def _in_loss(self, error: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.resolved(error) / self.change.to(error.dtype)
        return scaled

    def reported(self, error: torch.Tensor) -> torch.Tensor:
        """Return the resolved waves of errors, in standard deviations as states are. Collective on the state ranks."""
        waves: torch.Tensor = self.resolved(error)
        return waves

    def lead_time(self, batch: Windows, lead: int) -> dict[str, float]:
        """Return the column with the lead in days."""
        return {"days": (batch.times[0][lead] - batch.times[0][0]) / HOURS}

    # Model

    @property
    def scale(self) -> torch.Tensor:
        """The unit of q of each layer in the solve, in 1/s, float64."""
        scaling = self._parts.scaling
        assert scaling is not None
        return scaling.scale

    @cached_property
    def forcing(self) -> torch.Tensor:
        """The sub-grid forcing of the training samples in 1/s^2, `[trajectory, time, *local_shape]`."""
        return self.trajectories[1][: self.config.problem.trajectories]

    @cached_property
    def scales(self) -> Scales:
        """Standard deviations of q, u, v and forcing over the training samples. Collective on the state ranks."""
        equations = QGTendency(self.partition, self.config.problem.parameters)
        q = self.trajectories[0][: self.config.problem.trajectories]
        u, v = (torch.stack(each) for each in zip(*map(equations.velocities, q), strict=True))
        return scales_of(self.partition, q, u, v, self.forcing)

    def build_right_hand_side(self) -> ScaledTendency:
        """Build the coarse equations with the learnt closure."""
        model, seed = self.config.model, self.config.run.seed
        learnt = closure(
            model.closure,
            self.partition,
            channels=model.channels,
            layers=model.layers,
            kernel=model.kernel,
            momentum=model.momentum,
            scales=self.scales,
            dtype=self.dtype,
            seed=seed,
        )
        return self.tendency(learnt)

    def tendency(self, added: Closure | None) -> ScaledTendency:
        """Build the coarse equations with a closure, or with none, in the units of the solve. Not collective."""
        inside, between = (None, added) if self._step_hours else (added, None)
        equations = QGTendency(self.partition, self.config.problem.parameters, inside, self.dtype)
        return ScaledTendency(equations, self.scale.to(self.dtype), between)

    def build_model(self, func: ScaledTendency) -> QGModel:
        """Build the rollouts of windows and the forcing of states with `func`, with the filter after each step."""
        small_scales = SmallScaleFilter(self.partition, self.config.problem.parameters, self.dtype)
        trajectory, hours = self.config.trajectory.build(self._solves), self._step_hours
        mapped = small_scales if hours is None or func.closure is None else StepClosure(func, small_scales, hours)
        solve = self.neural_ode(func, self.partition, trajectory=trajectory, between_steps=mapped)
        return QGModel(solve, func, small_scales)

    @property
    def _step_hours(self) -> float | None:
        """The step of closures that are applied between steps; None: they are a part of the right-hand side.

        Raises `ConfigurationError` for steps that have not all the same size.
        """
        if self.config.model.applied == "stages":
            return None
        solver, interval = self.config.solver, self.config.problem.interval
        size = solver.step_size
        if size is None or solver.rtol or solver.atol or solver.jumps or not is_multiple(interval, size):
            raise ConfigurationError(
                f'[model] applied = "steps": needs steps of one size: [solver] step_size must divide [problem] '
                f"interval = {interval:g}, without rtol, atol and jumps"
            )
        return size

    def closures(self) -> Mapping[str, Closure | None]:
        """Return the closures that the learnt one is compared with."""
        parameters = self.config.problem.parameters
        found: dict[str, Closure | None] = {"no_closure": None}
        for name in self.config.evaluation.compared:
            found[name] = PUBLISHED[name](self.partition, parameters, dtype=self.dtype)
        return found

    # Training

    @property
    def _is_offline(self) -> bool:
        return self.config.problem.objective == "offline"

    def batches(self, epoch: int, done: int = 0) -> Iterator[Windows | ForcingBatch]:  # type: ignore[override]
        """Yield this replica's share of each batch: windows of the epoch's length, or states and their forcing."""
        window = self.config.problem.window if self._is_offline else self.config.problem.window_of(epoch)
        for share in shared(self.samples.starts(window), self.config, self.mesh, epoch, done):
            if self._is_offline:
                yield self.forcing_batch(share)
            else:
                yield windows(self.samples, share, window, self.dtype)

    def forcing_batch(self, starts: Sequence[Start]) -> ForcingBatch:
        """Return the states at `starts` of the training samples, and their forcing."""
        trajectory, first = torch.tensor(tuple(starts), dtype=torch.int64).reshape(-1, 2).unbind(1)
        initial, forcing = (values[trajectory, first].to(self.dtype) for values in (self.samples.values, self.forcing))
        return ForcingBatch(self.samples, tuple(starts), initial, forcing)

    def loss(self, model: nn.Module, batch: Windows | ForcingBatch) -> torch.Tensor:
        """Return this rank's share of the mean square error of the closure.

        Online it is that of the states' resolved waves, in units of their change from sample to sample, and offline
        that of the forcing, in standard deviations.
        """
        if isinstance(batch, Windows):
            return super().loss(model, batch)
        deviation = torch.tensor(self.scales.forcing, dtype=batch.forcing.dtype)
        error = (model(batch) - batch.forcing) / deviation
        count = len(batch.starts) * protocol.count(self.partition.global_shape)
        return share_of_mean(error.square().sum(), count, self.mesh)

    # Evaluation

    def baselines(self, batch: Windows) -> Mapping[str, Forecast]:
        """Forecast by persistence, without a closure, and with the published closures."""
        models = {name: self.build_model(self.tendency(added)) for name, added in self.closures().items()}
        return {"persistence": lambda lead: batch.initial, **models}

    def figures(self, batch: Windows) -> Mapping[str, Any]:
        """Return the grids, and the number of parameters of the closure."""
        problem = self.config.problem
        figures: dict[str, Any] = {
            "configuration": problem.configuration,
            "grid": list(problem.shape),
            "fine_grid": list(problem.fine),
            "closure_parameters": sum(value.numel() for value in self.model.parameters()),
        }
        return figures

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Return the errors of the forecasts, and with `free_run` the scores of long runs. Collective on the world.

        Writes `forecast.h5` and `report.png`, and of long runs the film `free_runs.gif`.
        """
        problem, evaluation = self.config.problem, self.config.evaluation
        interval = evaluation.free_run_interval or problem.interval
        samples = int(evaluation.free_run / interval)
        batch = self.held_out_windows(torch.float64)
        forecasts: dict[str, Forecast] = {"model": model, **self.baselines(batch)}
        figures = self.figures(batch)
        if not samples:
            return self.report(forecasts, batch, run_directory, figures)
        runs = self.free_runs(samples, interval)
        found, variables = evaluated(runs, problem.parameters, interval / HOURS, self.partition, self.mesh)
        result = self.report(forecasts, batch, run_directory, {**figures, **found}, variables)

        def film(path: Path) -> None:
            # Needs matplotlib, which may be missing.
            from pnode_dist.problems.qg.animation import draw_animation

            draw_animation(path, run_directory / FORECAST)

        return {**result, "film": draw(run_directory / FREE_RUNS, film, self.mesh)}

    def free_runs(self, samples: int, interval: float) -> Mapping[str, Run]:
        """Run on from the first held-out state with the learnt closure, with none, and with the published ones.

        Returns so many samples after the first, `interval` hours apart, as far as they are finite, and all samples at
        that distance of the held-out trajectories as the truth, in 1/s, float64. Collective on the world.
        """
        problem = self.config.problem
        held_out = slice(problem.trajectories, None), slice(None, None, round(interval / problem.interval))
        truth, subgrid = self.trajectories
        found = {"truth": Run(truth[held_out], subgrid[held_out])}
        initial = self.held_out.values[0, 0].to(self.dtype)
        models = {name: self.build_model(self.tendency(added)) for name, added in self.closures().items()}
        assert isinstance(self.model, QGModel)
        for name, model in {"model": self.model, **models}.items():
            states: list[torch.Tensor] = []
            forcing: list[torch.Tensor] = []

            def keep(
                _: int, state: torch.Tensor, model: QGModel = model, states: Any = states, forcing: Any = forcing
            ) -> None:
                states.append(self.physical(state.cpu()))
                forcing.append(model.closed(state).double().cpu())

            end = free_run(model.solve, initial.to(model.device), interval, samples, self.partition, keep)
            found[name] = Run(torch.stack(states), torch.stack(forcing), end.blown_up)
        return found

    # Cases

    def solve_case(self) -> SolveCase:
        """Return the first solve of a training batch with windows of the full length."""
        window = self.config.problem.window
        share = next(shared(self.samples.starts(window), self.config, self.mesh, 1))
        return self.model.first_case(windows(self.samples, share, window, self.dtype))

    def gradcheck_loss(self, batch: Windows) -> torch.Tensor:
        """Return this rank's share of the training loss of one batch. Collective on the world."""
        if not self._is_offline:
            return self.loss(self.model, batch)
        states = dataclasses.replace(self.forcing_batch(batch.starts), initial=batch.initial)
        return self.loss(self.model, states)


class PlannedQG(QGProblem):
    """The problem with noise in place of the fine runs: its solves have the same sizes."""

    @cached_property
    def trajectories(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise in 1/s and in 1/s^2, in the shape of q and of the forcing. Not collective."""
        problem = self.config.problem
        upper = initial_state(self.partition, problem.amplitude, problem.seed)
        noise = (upper + upper.flip(-1)).expand(2, problem.times, *self.partition.local_shape)
        return noise, noise / HOUR
