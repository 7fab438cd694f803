"""The graph diffusion problem once more, on the whole mesh in plain numpy and torch; a small configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp
from torch.nn import functional

from pnode_dist.problems.graph_diffusion.config import GraphDiffusionConfig, GraphDiffusionRun
from pnode_dist.problems.graph_diffusion.mesh import IrregularMesh

Array = npt.NDArray[Any]
Conductance = Callable[[Any, Any, Any], Any]

NODES = 24
TRAINING, VALIDATION, TIMES, WINDOW, INTERVAL = 2, 1, 5, 2, 0.1
CONDUCTIVITY = (0.01, 0.08)


def problem(**changes: Any) -> dict[str, Any]:
    """The table `[problem]` of a small problem."""
    return {
        "type": "graph_diffusion",
        "nodes": NODES,
        "conductivity": CONDUCTIVITY,
        "trajectories": TRAINING,
        "validation": VALIDATION,
        "times": TIMES,
        "interval": INTERVAL,
        "window": WINDOW,
        **changes,
    }


def problem_config(**changes: Any) -> GraphDiffusionConfig:
    """The same, validated."""
    return GraphDiffusionConfig.model_validate(problem(**changes))


def config(**tables: dict[str, Any]) -> GraphDiffusionRun:
    """A whole configuration; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": problem(),
        "model": {"hidden": (4, 3)},
        "solver": {"method": "rk4", "step_size": INTERVAL / 2},
        "training": {"epochs": 2, "batch_size": 2},
        "evaluation": {"leads": (1, 2, 4)},
    }
    for table, changes in tables.items():
        whole[table] = whole.get(table, {}) | changes
    return GraphDiffusionRun.model_validate(whole)


def dense(mesh: IrregularMesh) -> Array:
    """The lengths of the edges `[node, node]`, infinite where there is none."""
    lengths = np.full((len(mesh.points), len(mesh.points)), np.inf)
    for source, target in mesh.edge_index.T:
        lengths[target, source] = math.dist(mesh.points[source], mesh.points[target])
    return lengths


def rate(state: Any, lengths: Any, conductance: Conductance) -> Any:
    """du/dt `[..., node]` for whole states: a row of the dense matrix of flows for each node. numpy or torch."""
    mine, other = state[..., :, None], state[..., None, :]
    return (conductance((mine + other) / 2, (mine - other) ** 2, lengths) * (other - mine)).sum(-1)


def true_conductance(mean: Any, squared_difference: Any, lengths: Any) -> Any:
    """That of the equations."""
    return (CONDUCTIVITY[0] + CONDUCTIVITY[1] * mean**2) / lengths**2


def trajectory(mesh: IrregularMesh, initial: Array) -> Array:
    """The states `[time, node]` from a whole initial state, by scipy's integrator of order 8."""
    lengths = dense(mesh)
    times = np.arange(TIMES) * INTERVAL
    solved = solve_ivp(
        lambda t, u: rate(u, lengths, true_conductance),
        (0.0, float(times[-1])),
        initial,
        method="DOP853",
        t_eval=times,
        rtol=1e-12,
        atol=1e-12,
    )
    return np.asarray(solved.y.T)


def learnt_conductance(parameters: Mapping[str, torch.Tensor], mesh: IrregularMesh, constant: float) -> Conductance:
    """That of the model with these parameters, whose start is the `constant` conductivity."""
    mean_length = float(np.mean([math.dist(*mesh.points[list(ends)]) for ends in mesh.edge_index.T]))
    names = sorted({name.rsplit(".", 1)[0] for name in parameters})

    def conductance(mean: torch.Tensor, squared_difference: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        joined = lengths.isfinite()
        relative = torch.where(joined, lengths, 0.0) / mean_length
        x = torch.stack([mean, squared_difference, relative.expand(mean.shape)], dim=-1)
        for number, name in enumerate(names):
            x = functional.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])
            x = torch.tanh(x) if number < len(names) - 1 else x
        found = constant / mean_length**2 / math.log(2) * torch.log1p(torch.exp(x[..., 0]))
        return torch.where(joined, found, 0.0)

    return conductance


def rollout(mesh: IrregularMesh, initial: torch.Tensor, leads: int, conductance: Conductance) -> torch.Tensor:
    """The states `[lead, ..., node]` by Runge-Kutta steps of half an interval."""
    lengths, step = torch.from_numpy(dense(mesh)), INTERVAL / 2
    states, u = [], initial

    def f(v: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = rate(v, lengths, conductance)
        return found

    for _ in range(leads):
        for _ in range(2):
            k1 = f(u)
            k2 = f(u + step / 2 * k1)
            k3 = f(u + step / 2 * k2)
            k4 = f(u + step * k3)
            u = u + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(u)
    return torch.stack(states)
