"""Graph diffusion problem: learn the flow of heat on an irregular mesh from computed trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.problems.common.computed_problem import ComputedProblem
from pnode_dist.problems.common.forecast_data import Samples, SplitData, Windows
from pnode_dist.problems.common.forecast_model import ForecastModel
from pnode_dist.problems.common.forecast_parts import Scaling
from pnode_dist.problems.common.forecast_stream import Forecast, Row
from pnode_dist.problems.graph_diffusion.config import DiffusionParameters
from pnode_dist.problems.graph_diffusion.data import constant_conductivity, trajectories
from pnode_dist.problems.graph_diffusion.mesh import IrregularMesh, irregular_mesh
from pnode_dist.problems.graph_diffusion.model import LearntFlux
from pnode_dist.problems.graph_diffusion.physics import Diffusion, Flux
from pnode_dist.report.dataset_file import Variable

if TYPE_CHECKING:
    from pnode_dist.problems.graph_diffusion.config import GraphDiffusionRun

_TEMPERATURES = 41


class GraphDiffusionProblem(ComputedProblem):
    """Learn the flow of heat on an irregular mesh, with temperatures in units of their root mean square.

    The model is compared with linear diffusion: the true equations, with their dependence on the lengths of edges, and
    one constant conductivity, fitted to the training trajectories. Linear diffusion is solved with the model's steps.
    """

    config: GraphDiffusionRun
    plots = "pnode_dist.problems.graph_diffusion.plots"
    partition: GraphPartition
    model: ForecastModel
    model_variable = "model"

    @cached_property
    def nodes(self) -> IrregularMesh:
        """The mesh, the same on all ranks. The first access is collective on the world."""
        problem = self.config.problem
        made = irregular_mesh(problem.nodes, problem.mesh_seed) if self.mesh.is_root else None
        nodes: IrregularMesh = self.mesh.broadcast_object(made)
        return nodes

    @cached_property
    def lengths(self) -> torch.Tensor:
        """The lengths `[local_edges, 1]` of this rank's edges. Collective on the state ranks."""
        return self.partition.scatter_edges(torch.from_numpy(self.nodes.lengths)[:, None])

    def build_partition(self) -> GraphPartition:
        """Partition the nodes by `[problem] ownership`."""
        problem = self.config.problem
        try:
            return GraphPartition(self.mesh, self.nodes.edge_index, problem.nodes, 1, problem.ownership)
        except ConfigurationError as error:
            raise ConfigurationError(f"[problem] {error}") from None

    def load_data(self) -> SplitData:
        """Compute all trajectories. Collective on the state ranks."""
        learnt = self.config.problem.trajectories
        states = trajectories(self.config.problem, self.nodes, self.partition, self.lengths)
        return self.split_data(states[:learnt], states[learnt:], local=True, dimensions=("node",))

    def build_scaling(self, learnt: Samples) -> Scaling:
        """Scale by the root mean square of the training trajectories. Collective on the state ranks."""
        count = learnt.count * learnt.length * self.config.problem.nodes
        square = self.mesh.sum(learnt.values.square().sum(), over="state") / count
        return Scaling(torch.zeros(()), square.sqrt())

    @cached_property
    def conductivity(self) -> float:
        """The constant conductivity, fitted to the changes of the training trajectories from sample to sample."""
        unit = Diffusion(self.partition, Flux(DiffusionParameters((1.0, 0.0))), self.lengths)
        return constant_conductivity(self.samples.values, unit, self.config.problem.interval, self.mesh)

    def build_right_hand_side(self) -> Diffusion:
        """Build the learnt diffusion, which starts near diffusion with the constant conductivity."""
        length = float(self.nodes.lengths.mean())
        flux = LearntFlux(self.config.model, self.conductivity / length**2, length, self.config.run.seed)
        return Diffusion(self.partition, flux, self.lengths)

    def baselines(self, batch: Windows) -> Mapping[str, Forecast]:
        """Return persistence and linear diffusion."""
        linear = Diffusion(self.partition, Flux(DiffusionParameters((self.conductivity, 0.0))), self.lengths)
        return {"persistence": lambda lead: batch.initial, "linear": self.build_model(linear.to(self.dtype))}

    def figures(self, batch: Windows) -> Mapping[str, Any]:
        """Return the sizes of the mesh, the fitted conductivity and `heat_drift`.

        `heat_drift` is the largest relative change of a rollout's total heat.
        """
        # Start from the rounded initial state of the model: rounding changes the total heat as well.
        initial = batch.initial.to(self.dtype).double()
        return {
            "nodes": self.config.problem.nodes,
            "edges": self.partition.global_edges,
            "edges_between_ranks": self.partition.edge_cut,
            "linear_conductivity": self.conductivity,
            "heat_drift": HeatDrift(initial, batch.steps, self.mesh),
        }

    def variables(self, batch: Windows) -> Mapping[str, Variable]:
        """Return the mesh and the conductivities, as variables of the file. Collective on the world."""
        mesh = {
            "x": Variable(("node",), self.nodes.points[:, 0]),
            "y": Variable(("node",), self.nodes.points[:, 1]),
            "edge_index": Variable(("end", "edge"), self.nodes.edge_index),
        }
        return {**mesh, **self._conductivities()}

    def _conductivities(self) -> dict[str, Variable]:
        """Return the true, the learnt and the constant conductivity. Collective on the world.

        The learnt conductivity is c l^2 for edges of mean length with both ends at the same temperature.
        """
        diffusion = self.model.solve.func
        assert isinstance(diffusion, Diffusion)
        flux = diffusion.flux.message
        assert isinstance(flux, LearntFlux)
        # A rank may own no node.
        states = torch.cat([*(part.values.flatten() for part in (self.samples, self.held_out)), torch.zeros(1)])
        warmest = self.mesh.max(states.amax()).item()
        ends = torch.linspace(0.0, warmest, _TEMPERATURES, dtype=torch.float64).unsqueeze(-1)
        with torch.no_grad():
            own = ends.to(self.dtype)
            learnt = flux.conductances(own, own, torch.tensor([flux.length], dtype=self.dtype)) * flux.length**2
        temperatures = self.physical(ends).squeeze(-1)
        true = Flux(self.config.problem.parameters).conductivity(temperatures)
        return {
            "temperature": Variable(("temperature",), temperatures),
            "conductivity_true": Variable(("temperature",), true),
            "conductivity_learnt": Variable(("temperature",), learnt.double().squeeze(-1)),
            "conductivity_constant": Variable((), self.conductivity),
        }


class HeatDrift:
    """The largest relative change of the total heat of the model's forecasts, from the `initial` states."""

    def __init__(self, initial: torch.Tensor, steps: int, mesh: Mesh) -> None:
        self._mesh = mesh
        self._heat = torch.zeros(1 + steps, len(initial), dtype=torch.float64)
        self._heat[0] = initial.sum(dim=(1, 2))

    def add(self, name: str, row: Row) -> None:
        """Take the states of the model at one lead."""
        if name == "model":
            self._heat[row.lead, list(row.starts)] = row.states.sum(dim=(1, 2))

    def result(self) -> float:
        """Return the change. Collective on the state ranks."""
        heat = self._mesh.sum(self._heat, over="state")
        return float((heat / heat[0] - 1).abs().max())
