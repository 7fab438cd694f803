"""Data of the graph diffusion problem: trajectories on a mesh, computed from the equations by PETSc."""

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
    """Compute all trajectories `[trajectory, time, local_nodes, 1]`, training trajectories first.

    `lengths` `[local_edges, 1]` are the lengths of the edges. Collective on the state ranks. Raises
    `ConfigurationError` on all ranks if the solution of the equations cannot be integrated.
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
    """Fit one constant conductivity k to the changes of states from sample to sample, by least squares.

    The change per unit of time between two samples is modelled as k times the mean of unit diffusion at both. `states`
    is `[trajectory, time, local_nodes, 1]`. Collective on the state ranks.
    """
    with torch.no_grad():
        rate = unit(torch.zeros(()), states)
    changes = states.diff(dim=1) / interval
    means = (rate[:, 1:] + rate[:, :-1]) / 2
    products = torch.stack([(changes * means).sum(), means.square().sum()])
    both, square = mesh.sum(products, over="state").tolist()
    return float(both / square)
