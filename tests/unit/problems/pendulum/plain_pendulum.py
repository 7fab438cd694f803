"""The pendulum and its model once more, in plain numpy, scipy and torch; small configurations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp

from pnode_dist.problems.pendulum.config import PendulumConfig, PendulumParameters, PendulumRun
from pnode_dist.problems.pendulum.data import Motions

Array = npt.NDArray[Any]

TIMES, INTERVAL, WINDOW = 6, 0.1, 2
TRAINING, VALIDATION = 4, 3
LENGTH, GRAVITY, DRAG, WIND = 0.8, 9.0, (0.2, 0.1), 1.5
PARAMETERS = PendulumParameters(LENGTH, GRAVITY, DRAG, WIND)


def problem(**changes: Any) -> dict[str, Any]:
    """The table `[problem]` of a small problem."""
    return {
        "type": "pendulum",
        "length": LENGTH,
        "gravity": GRAVITY,
        "drag": DRAG,
        "wind": WIND,
        "trajectories": TRAINING,
        "validation": VALIDATION,
        "times": TIMES,
        "interval": INTERVAL,
        "window": WINDOW,
    } | changes


def problem_config(**changes: Any) -> PendulumConfig:
    """The same, validated."""
    return PendulumConfig.model_validate(problem(**changes))


def config(**tables: dict[str, Any]) -> PendulumRun:
    """A whole configuration; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": problem(),
        "model": {"hidden": (5, 4), "activation": "tanh"},
        "solver": {"method": "cn", "step_size": INTERVAL / 2, "preconditioner": "block"},
        "training": {"epochs": 2, "batch_size": 2, "dtype": "float64"},
        "evaluation": {"leads": (1, 3, 5)},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return PendulumRun.model_validate(whole)


def applied_force(velocity: Array) -> Array:
    """Gravity and drag on one mass."""
    relative = velocity - [WIND, 0.0]
    speed = np.hypot(*relative)
    return np.array([0.0, -GRAVITY]) - DRAG[0] * relative - DRAG[1] * speed * relative


def motion(angle: float, angular_velocity: float, times: Array) -> Array:
    """The states `[time, 5]` of one motion, in Cartesian coordinates, by scipy's eighth-order integrator.

    The tension comes from the force on the mass less what its acceleration leaves, the acceleration in the
    direction of the pivot being that of motion on a circle.
    """

    def rates(t: float, u: Array) -> Array:
        along = np.array([np.cos(u[0]), np.sin(u[0])])
        return np.array([u[1], applied_force(LENGTH * u[1] * along) @ along / LENGTH])

    solved = solve_ivp(rates, (0.0, times[-1]), [angle, angular_velocity], "DOP853", times, rtol=1e-12, atol=1e-12)
    found = []
    for turned, turning in solved.y.T:
        position = LENGTH * np.array([np.sin(turned), -np.cos(turned)])
        velocity = LENGTH * turning * np.array([np.cos(turned), np.sin(turned)])
        to_pivot = -position / LENGTH
        pull = LENGTH * turning**2 - applied_force(velocity) @ to_pivot
        found.append([*position, *velocity, pull / LENGTH])
    return np.array(found)


def learnt_force(parameters: dict[str, torch.Tensor], data: Motions, state: torch.Tensor) -> torch.Tensor:
    """The model's force, with activation tanh, at states `[..., 4 or more]`."""
    x = (state[..., :4] - data.mean[:4]) / data.deviation[:4]
    layers = sum(name.endswith("weight") for name in parameters)
    for number in range(layers):
        x = x @ parameters[f"network.layers.{number}.weight"].T + parameters[f"network.layers.{number}.bias"]
        x = torch.tanh(x) if number < layers - 1 else x
    return data.force_mean + data.force_deviation * x


def eliminated(parameters: dict[str, torch.Tensor], data: Motions, state: torch.Tensor) -> torch.Tensor:
    """d(x, y, vx, vy)/dt `[..., 4]` with the tension eliminated, and the tension behind them `[..., 5]`."""
    position, velocity = state[..., 0:2], state[..., 2:4]
    force = learnt_force(parameters, data, state)
    tension = (velocity.square().sum(-1) + (position * force).sum(-1)) / position.square().sum(-1)
    acceleration = force - tension[..., None] * position
    return torch.cat([velocity, acceleration, tension[..., None]], dim=-1)


def trapezoidal_rollout(
    parameters: dict[str, torch.Tensor], data: Motions, initial: torch.Tensor, leads: int, steps: int
) -> torch.Tensor:
    """`[lead, trajectory, 5]` by the trapezoidal rule on the ODE without the tension, `steps` of them to a sample.

    On an index-1 DAE that is the same method. Every step is a fixed-point iteration, differentiable by torch.
    """
    size = INTERVAL / steps
    state, found = initial[..., :4], []
    for _ in range(leads):
        for _ in range(steps):
            known = state + size / 2 * eliminated(parameters, data, state)[..., :4]
            after = state
            for _ in range(40):
                after = known + size / 2 * eliminated(parameters, data, after)[..., :4]
            state = after
        tension = eliminated(parameters, data, state)[..., 4:]
        found.append(torch.cat([state, tension], dim=-1))
    return torch.stack(found)
