"""Robertson's reactions and the model once more, in plain numpy, scipy and torch; small configurations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp

from pnode_dist.problems.robertson.config import RobertsonConfig, RobertsonRun

Array = npt.NDArray[Any]

RATES = (0.04, 3e7, 1e4)
TIMES, WINDOW = 15, 2
TRAINING, VALIDATION = 4, 3
LOG_TIMES = np.linspace(-5, 2, TIMES)
SPACING = 7 / (TIMES - 1)


def problem(**changes: Any) -> dict[str, Any]:
    """The table `[problem]` of a small problem."""
    return {
        "type": "robertson",
        "times": TIMES,
        "trajectories": TRAINING,
        "validation": VALIDATION,
        "window": WINDOW,
    } | changes


def problem_config(**changes: Any) -> RobertsonConfig:
    """The same, validated."""
    return RobertsonConfig.model_validate(problem(**changes))


def config(**tables: dict[str, Any]) -> RobertsonRun:
    """A whole configuration; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": problem(),
        "model": {"hidden": (5, 4), "activation": "tanh", "bias": True},
        "solver": {
            "method": "cn",
            "preconditioner": "block",
            "petsc_options": {"snes_linesearch_type": "basic", "snes_divergence_tolerance": 1e30},
        },
        "training": {"epochs": 2, "batch_size": 5, "dtype": "float64"},
        "rival": {"steps": 60},
        "evaluation": {"leads": (1, 7, 14)},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return RobertsonRun.model_validate(whole)


def rates(y: Array) -> Array:
    """dy/dt of one mixture, reaction by reaction."""
    first, second, third = RATES[0] * y[0], RATES[1] * y[1] ** 2, RATES[2] * y[1] * y[2]
    change = first * np.array([-1.0, 1.0, 0.0])
    change += second * np.array([0.0, -1.0, 1.0])
    return np.asarray(change + third * np.array([1.0, -1.0, 0.0]))


def by_radau(initial: Array, times: Array) -> Array:
    """The concentrations `[time, 3]`, by scipy's implicit Runge-Kutta method of order 5."""
    solved = solve_ivp(
        lambda t, y: rates(y), (0.0, times[-1]), initial, "Radau", times, rtol=1e-11, atol=[1e-13, 1e-17, 1e-15]
    )
    return np.asarray(solved.y.T)


def slope(parameters: dict[str, torch.Tensor], rate: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The model's dw/dt in physical time, with activation tanh, of states `[..., 3]`; only B, the second, is fast."""
    x = state
    layers = sum(name.endswith("weight") for name in parameters)
    for number in range(layers):
        x = x @ parameters[f"network.layers.{number}.weight"].T + parameters[f"network.layers.{number}.bias"]
        x = torch.tanh(x) if number < layers - 1 else x
    return rate * (x - state * torch.tensor([0.0, 1.0, 0.0], dtype=state.dtype))


def trapezoidal_rollout(
    parameters: dict[str, torch.Tensor], rate: torch.Tensor, initial: torch.Tensor, begin: float, leads: int
) -> torch.Tensor:
    """`[lead, trajectory, 3]` by the trapezoidal rule in log10 t, one step a sample, starting at the time `begin`.

    Every step is a Newton iteration for each trajectory, differentiable by torch: the last iteration, from the solution
    with a constant Jacobian, has the derivatives of the implicit function.
    """

    def implicit_part(time: float, state: torch.Tensor) -> torch.Tensor:
        return state - SPACING / 2 * math.log(10.0) * time * slope(parameters, rate, state)

    found = []
    state = initial
    for lead in range(leads):
        before, after = (begin * 10 ** ((lead + number) * SPACING) for number in (0, 1))
        known = 2 * state - implicit_part(before, state)
        jacobians = torch.func.vmap(torch.func.jacrev(partial(implicit_part, after)))
        guess = state.detach()
        for _ in range(12):
            residual = (implicit_part(after, guess) - known).detach()
            guess = guess - torch.linalg.solve(jacobians(guess).detach(), residual)
        residual = implicit_part(after, guess) - known
        state = guess - torch.linalg.solve(jacobians(guess).detach(), residual)
        found.append(state)
    return torch.stack(found)
