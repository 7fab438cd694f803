"""The Gray-Scott equations and model once more, on the whole grid in plain numpy and torch; small configurations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp
from torch.nn import functional

from pnode_dist.problems.gray_scott.config import GrayScottConfig, GrayScottRun

Array = npt.NDArray[Any]

NY, NX = 10, 13
DOMAIN = (0.25, 0.3)
TIMES, INTERVAL, WINDOW = 5, 4.0, 2
TRAINING, VALIDATION = 2, 1


def problem(**changes: Any) -> dict[str, Any]:
    """The table `[problem]` of a small problem."""
    return {
        "type": "gray_scott",
        "shape": (NY, NX),
        "domain": DOMAIN,
        "trajectories": TRAINING,
        "validation": VALIDATION,
        "times": TIMES,
        "interval": INTERVAL,
        "window": WINDOW,
    } | changes


def problem_config(**changes: Any) -> GrayScottConfig:
    """The same, validated."""
    return GrayScottConfig.model_validate(problem(**changes))


def config(**tables: dict[str, Any]) -> GrayScottRun:
    """A whole configuration; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": problem(),
        "model": {"channels": 4, "layers": 3, "activation": "tanh"},
        "solver": {"step_size": 2.0},
        "training": {"epochs": 2, "batch_size": 2},
        "evaluation": {"leads": (1, 2, 4)},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return GrayScottRun.model_validate(whole)


def rates(
    state: Array,
    diffusion: tuple[float, float] = (8e-5, 4e-5),
    feed: float = 0.024,
    kill: float = 0.06,
    domain: tuple[float, float] = DOMAIN,
) -> Array:
    """du/dt and dv/dt of a whole periodic state `[y, x, 2]`, with np.roll."""
    u, v = state[..., 0], state[..., 1]
    dy, dx = (length / points for length, points in zip(domain, u.shape, strict=True))

    def laplacian(c: Array) -> Array:
        along_y = (np.roll(c, 1, 0) + np.roll(c, -1, 0) - 2 * c) / dy**2
        along_x = (np.roll(c, 1, 1) + np.roll(c, -1, 1) - 2 * c) / dx**2
        return np.asarray(along_y + along_x)

    u_rate = diffusion[0] * laplacian(u) - u * v**2 + feed * (1 - u)
    v_rate = diffusion[1] * laplacian(v) + u * v**2 - (feed + kill) * v
    return np.stack([u_rate, v_rate], axis=-1)


def trajectory(initial: Array, times: int = TIMES, interval: float = INTERVAL) -> Array:
    """The samples `[time, y, x, 2]` from a whole initial state, by scipy's eighth-order integrator."""
    solved = solve_ivp(
        lambda t, flat: rates(flat.reshape(initial.shape)).ravel(),
        (0.0, (times - 1) * interval),
        initial.ravel(),
        method="DOP853",
        t_eval=np.arange(times) * interval,
        rtol=1e-12,
        atol=1e-12,
    )
    return np.asarray(solved.y.T.reshape(times, *initial.shape))


def tendency(parameters: dict[str, torch.Tensor], rate: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The model's right-hand side with activation tanh on whole states `[window, y, x, species]`."""

    def convolved(x: torch.Tensor, layer: str) -> torch.Tensor:
        wide = functional.pad(x, (1, 1, 1, 1), mode="circular")
        return functional.conv2d(wide, parameters[f"{layer}.weight"], parameters[f"{layer}.bias"])

    x = torch.tanh(convolved(state.permute(0, 3, 1, 2), "hidden.0"))
    for number in range(1, sum(name.endswith("weight") for name in parameters) - 1):
        x = x + torch.tanh(convolved(x, f"hidden.{number}"))
    return rate * convolved(x, "output").permute(0, 2, 3, 1)


def rollout(
    parameters: dict[str, torch.Tensor], rate: torch.Tensor, initial: torch.Tensor, leads: int, step: float
) -> torch.Tensor:
    """RK4 over the model: `[lead, window, y, x, species]`, normalised."""
    state, found = initial, []
    for _ in range(leads):
        for _ in range(round(INTERVAL / step)):
            k1 = tendency(parameters, rate, state)
            k2 = tendency(parameters, rate, state + step / 2 * k1)
            k3 = tendency(parameters, rate, state + step / 2 * k2)
            k4 = tendency(parameters, rate, state + step * k3)
            state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(state)
    return torch.stack(found)


def normalisation(states: Array) -> tuple[Array, Array, Array]:
    """Mean, deviation and rate `[species]` of trajectories `[trajectory, time, y, x, species]`."""
    axes = (0, 1, 2, 3)
    mean, deviation = states.mean(axis=axes), states.std(axis=axes)
    changes = np.diff(states / deviation, axis=1) / INTERVAL
    return mean, deviation, np.sqrt((changes**2).mean(axis=axes))
