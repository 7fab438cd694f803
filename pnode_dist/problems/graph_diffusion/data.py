"""The data of the graph diffusion problem: trajectories on a mesh that PETSc computes from the equations."""

from __future__ import annotations

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.graph import GraphPartition
from pnode_dist.problems.common.reference import NotIntegrableError, reference
from pnode_dist.problems.graph_diffusion.config import GraphDiffusionConfig
from pnode_dist.problems.graph_diffusion.mesh import IrregularMesh
from pnode_dist.problems.graph_diffusion.physics import Diffusion, Flux, initial_state

_PREFIX = "graph_diffusion_data_"


def trajectories(
    config: GraphDiffusionConfig, nodes: IrregularMesh, partition: GraphPartition, lengths: torch.Tensor
) -> torch.Tensor:
    """All trajectories `[trajectory, time, local_nodes, 1]`, those to learn from first. Collective on the state ranks.

    `lengths` `[local_edges, 1]` are those of the edges. Raises `ConfigurationError` on all ranks for equations whose
    solution cannot be followed.
    """
    equations = Diffusion(partition, Flux(config.parameters), lengths)
    numbers = range(config.trajectories + config.validation)
    initial = [initial_state(nodes, config.seed, number)[partition.owned] for number in numbers]
    try:
        return torch.stack(
            [reference(equations, state, config.times, config.interval, partition, _PREFIX) for state in initial]
        )
    except NotIntegrableError as error:
        raise ConfigurationError(f"[problem]: the equations {error}: conductivity is too large") from None


def constant_conductivity(states: torch.Tensor, unit: Diffusion, interval: float, mesh: Mesh) -> float:
    """k that fits the changes from sample to sample by k times the mean of unit diffusion at both, in least squares.

    `states` is `[trajectory, time, local_nodes, 1]`. Collective on the state ranks.
    """
    with torch.no_grad():
        rate = unit(torch.zeros(()), states)
    changes = states.diff(dim=1) / interval
    means = (rate[:, 1:] + rate[:, :-1]) / 2
    products = torch.stack([(changes * means).sum(), means.square().sum()])
    both, square = mesh.sum(products, over="state").tolist()
    return float(both / square)
