"""The data of the graph diffusion problem: a mesh, and trajectories on it that PETSc computes from the equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.problems.common.reference import NotIntegrableError, reference
from pnode_dist.problems.common.trajectories import Trajectories
from pnode_dist.problems.graph_diffusion.config import DiffusionParameters, GraphDiffusionConfig
from pnode_dist.problems.graph_diffusion.mesh import IrregularMesh, irregular_mesh
from pnode_dist.problems.graph_diffusion.physics import Diffusion, Flux, initial_state

_PREFIX = "graph_diffusion_data_"
_UNIT = DiffusionParameters((1.0, 0.0))


@dataclass(frozen=True)
class MeshData:
    """The mesh, how it lies on the ranks, and this rank's part of what happens on it.

    `lengths` `[local_edges, 1]` are those of its edges. `conductivity` is the constant one that explains best what the
    trajectories to learn from change from one sample to the next.
    """

    mesh: IrregularMesh
    partition: GraphPartition
    lengths: torch.Tensor
    trajectories: Trajectories
    conductivity: float


def partitioned_mesh(config: GraphDiffusionConfig, mesh: Mesh) -> tuple[IrregularMesh, GraphPartition]:
    """The configured mesh, the same on all ranks, and its partition. Collective on the world.

    Raises `ConfigurationError` on all ranks for an ownership that there is not.
    """
    nodes: IrregularMesh = mesh.broadcast_object(
        irregular_mesh(config.nodes, config.mesh_seed) if mesh.is_root else None
    )
    try:
        return nodes, GraphPartition(mesh, nodes.edge_index, config.nodes, 1, config.ownership)
    except ConfigurationError as error:
        raise ConfigurationError(f"[problem] {error}") from None


def generate(config: GraphDiffusionConfig, nodes: IrregularMesh, partition: GraphPartition, mesh: Mesh) -> MeshData:
    """Compute all trajectories, in units of the root mean square of those to learn from. Collective on the state ranks.

    Raises `ConfigurationError` on all ranks for equations whose solution cannot be followed.
    """
    lengths = partition.scatter_edges(torch.from_numpy(nodes.lengths)[:, None])
    equations = Diffusion(partition, Flux(config.parameters), lengths)
    initial = [
        initial_state(nodes, config.seed, number)[partition.owned]
        for number in range(config.trajectories + config.validation)
    ]
    try:
        states = torch.stack(
            [reference(equations, state, config.times, config.interval, partition, _PREFIX) for state in initial]
        )
    except NotIntegrableError as error:
        raise ConfigurationError(f"[problem]: the equations {error}: conductivity is too large") from None
    learnt = states[: config.trajectories]
    values = config.trajectories * config.times * config.nodes
    scale = float(mesh.sum(learnt.square().sum(), over="state") / values) ** 0.5
    conductivity = _constant_conductivity(learnt, Diffusion(partition, Flux(_UNIT), lengths), config.interval, mesh)
    trajectories = Trajectories(states / scale, scale, config.trajectories, config.interval)
    return MeshData(nodes, partition, lengths, trajectories, conductivity)


def _constant_conductivity(states: torch.Tensor, unit: Diffusion, interval: float, mesh: Mesh) -> float:
    """k that fits the changes from sample to sample by k times the mean of unit diffusion at both, in least squares.

    Collective on the state ranks.
    """
    with torch.no_grad():
        rate = unit(torch.zeros(()), states)
    changes = (states[:, 1:] - states[:, :-1]) / interval
    means = (rate[:, 1:] + rate[:, :-1]) / 2
    products = torch.stack([(changes * means).sum(), means.square().sum()])
    both, square = mesh.sum(products, over="state").tolist()
    return float(both / square)
