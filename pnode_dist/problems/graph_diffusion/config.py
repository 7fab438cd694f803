"""Configuration of the graph diffusion problem: the mesh, the trajectories that are computed, and the model.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StrictStr, field_validator

from pnode_dist.config.definition import ModelTable
from pnode_dist.config.tables import Count, ForecastRun, NotNegative, Positive
from pnode_dist.problems.common.tables import ComputedTable, Seed

Nodes = Annotated[int, Field(ge=4, strict=True)]


@dataclass(frozen=True)
class DiffusionParameters:
    """Heat that flows along the edges of a mesh: du_i/dt = sum over the neighbours j of k(m) (u_j - u_i) / l^2.

    l is the length of the edge, m = (u_i + u_j) / 2, and k(m) = k0 + k2 m^2 the conductivity: `conductivity` is
    `(k0, k2)`. The domain is the unit square; all is dimensionless.
    """

    conductivity: tuple[float, float] = (0.005, 0.04)


class GraphDiffusionConfig(ComputedTable):
    """The table `[problem]` with `type = "graph_diffusion"`: trajectories computed from the equations, to learn from.

    See `DiffusionParameters`. A sample is the state at one time, and samples of a trajectory are `interval` apart, the
    first at time 0.
    """

    type: Literal["graph_diffusion"]
    """The name of the problem."""
    nodes: Nodes
    """The number of nodes of the mesh."""
    mesh_seed: Seed = 0
    """Seed of the positions of the nodes."""
    ownership: StrictStr = "bisection"
    """The split of the nodes over the state ranks: `bisection`, `contiguous`, `metis` (needs pymetis), `auto`, or the
    name of a partitioner of PETSc."""
    conductivity: tuple[NotNegative, NotNegative] = DiffusionParameters.conductivity
    """The coefficients (k0, k2) of the conductivity k0 + k2 u^2 of an edge, dimensionless."""
    interval: Positive
    """Time between samples, dimensionless."""

    @field_validator("conductivity")
    @classmethod
    def _conducts(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not any(value):
            raise ValueError("must not be zero altogether, or nothing changes")
        return value

    @property
    def parameters(self) -> DiffusionParameters:
        """The equations' own."""
        return DiffusionParameters(self.conductivity)


class GraphDiffusionModelConfig(ModelTable):
    """The table `[model]` of a graph diffusion problem: the perceptron in place of the conductivity."""

    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 16)
    """Units of each hidden layer."""
    activation: Literal["gelu", "silu", "tanh"] = "tanh"
    """The activation function between layers."""


class GraphDiffusionRun(ForecastRun):
    """A whole configuration of a graph diffusion problem."""

    problem: GraphDiffusionConfig
    model: GraphDiffusionModelConfig = GraphDiffusionModelConfig()
