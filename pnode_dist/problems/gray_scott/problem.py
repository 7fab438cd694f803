"""Gray-Scott problem: learn the reaction and diffusion of two species from computed trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import Inverse
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.computed_problem import ComputedProblem
from pnode_dist.problems.common.forecast_data import Samples, SplitData, Windows
from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.gray_scott.assimilation import Twin, evaluated, inverse_of, twin
from pnode_dist.problems.gray_scott.data import rate_of_change, trajectories
from pnode_dist.problems.gray_scott.model import ConvolutionalTendency, right_hand_side
from pnode_dist.problems.gray_scott.physics import SPECIES
from pnode_dist.report.dataset_file import Variable
from pnode_dist.report.picture import draw
from pnode_dist.runs.directory import ANALYSIS, FORECAST_PICTURE, METRICS
from pnode_dist.train.problem import Inversion

if TYPE_CHECKING:
    from pnode_dist.problems.gray_scott.config import GrayScottRun


class GrayScottProblem(ComputedProblem):
    """Learn the reaction and diffusion of two species on a periodic plane, with normalised concentrations."""

    config: GrayScottRun
    plots = "pnode_dist.problems.gray_scott.plots"
    partition: GridPartition
    normalised = True
    stores_baselines = False

    def build_partition(self) -> GridPartition:
        """Partition the grid into blocks. Collective on the state ranks."""
        problem = self.config.problem
        try:
            return GridPartition(self.mesh, problem.shape, len(SPECIES), ("periodic", "periodic"), 1, problem.processes)
        except ConfigurationError as error:
            key = f"[mesh] state = {self.mesh.state_ranks}" if problem.processes is None else "[problem] processes"
            raise ConfigurationError(f"{key}: {error}") from None

    def load_data(self) -> SplitData:
        """Compute all trajectories. Collective on the state ranks."""
        problem = self.config.problem
        states = trajectories(problem, self.partition)
        lengths = zip(self.partition.axes, problem.shape, problem.domain, strict=True)
        return self.split_data(
            states[: problem.trajectories],
            states[problem.trajectories :],
            local=True,
            names=SPECIES,
            dimensions=(*self.partition.axes, "species"),
            coordinates={axis: np.arange(points) * (length / points) for axis, points, length in lengths},
        )

    def build_scaling(self, learnt: Samples) -> Scaling | None:
        """Scale by the mean and standard deviation of each species.

        Raises `ConfigurationError` if a species is at rest in all training trajectories.
        """
        if not bool(self.mesh.max((learnt.values - learnt.values[:1, :1]).abs().amax(dim=(0, 1, 2, 3))).all()):
            raise ConfigurationError(
                f"[problem] shape = {list(self.config.problem.shape)}: too coarse: the initial states' bumps lie "
                "between its points"
            )
        return super().build_scaling(learnt)

    def build_right_hand_side(self) -> ConvolutionalTendency:
        """Build the learnt tendency, scaled to the rate of change of the training trajectories."""
        model = self.config.model
        rate = rate_of_change(self.samples, self.mesh)
        seed = self.config.run.seed
        return right_hand_side(self.partition, model.channels, model.layers, self.dtype, model.activation, rate, seed)

    def figures(self, batch: Windows) -> Mapping[str, Any]:
        """Return the names of the species and the shape of the grid."""
        return {"species": list(SPECIES), "grid": list(self.config.problem.shape)}

    @cached_property
    def twin(self) -> Twin:
        """The first validation trajectory and its observations, for `invert`."""
        truth = self.physical(self.held_out.values[0])
        return twin(self.config, self.partition, self.held_out.times.tolist(), truth)

    def inverse(self) -> Inverse:
        """Return the inverse problem of the initial state. Collective on the state ranks."""
        return inverse_of(self.config, self.twin)

    def evaluate_inverse(self, found: Inversion, run_directory: Path) -> dict[str, Any]:
        """Return the errors of first guess and analysis; write `analysis.h5` and `report.png`."""
        file = run_directory / ANALYSIS
        figures = evaluated(self.config, self.mesh, self.twin, found, file)

        def picture(path: Path) -> None:
            # Needs matplotlib, which may be missing.
            from pnode_dist.problems.gray_scott.assimilation_plots import draw_assimilation

            draw_assimilation(path, file, path.with_name(METRICS))

        drawn = draw(run_directory / FORECAST_PICTURE, picture, self.mesh)
        return {"problem": self.name, **figures, "analysis": str(file), "report": drawn}

    def variables(self, batch: Windows) -> Mapping[str, Variable]:
        """Return the means of the training trajectories, as a variable of the file."""
        return {"training_mean": Variable(("species",), self.physical(self.moments[0]))}
