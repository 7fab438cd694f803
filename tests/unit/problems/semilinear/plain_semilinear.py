"""The semilinear equations and their model once more, on whole lines in plain numpy and torch; small configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp
from torch.nn import functional

from pnode_dist.problems.semilinear.config import (
    BurgersConfig,
    BurgersRun,
    KuramotoSivashinskyConfig,
    KuramotoSivashinskyRun,
)
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.implicit import odeint_implicit

Array = npt.NDArray[Any]

POINTS = 36
TRAINING, VALIDATION, TIMES, WINDOW = 2, 1, 5, 2
# Length, a of u_xx, b of u_xxxx, time between samples, spin-up, step: (name of the problem) -> numbers.
CASES: dict[str, dict[str, float]] = {
    "kuramoto_sivashinsky": {
        "length": 22.0,
        "second": -1.0,
        "fourth": -1.0,
        "interval": 0.5,
        "spin_up": 3.0,
        "step": 0.125,
    },
    "burgers": {"length": 1.0, "second": 0.02, "fourth": 0.0, "interval": 0.05, "spin_up": 0.0, "step": 0.0125},
}


def problem(name: str, **changes: Any) -> dict[str, Any]:
    """The table `[problem]` of a small problem."""
    case = CASES[name]
    table = {
        "type": name,
        "points": POINTS,
        "length": case["length"],
        "trajectories": TRAINING,
        "validation": VALIDATION,
        "times": TIMES,
        "interval": case["interval"],
        "spin_up": case["spin_up"],
        "window": WINDOW,
    }
    return table | ({"viscosity": case["second"]} if name == "burgers" else {}) | changes


def problem_config(name: str, **changes: Any) -> BurgersConfig | KuramotoSivashinskyConfig:
    """The same, validated."""
    kind = BurgersConfig if name == "burgers" else KuramotoSivashinskyConfig
    return kind.model_validate(problem(name, **changes))


def config(name: str, **tables: dict[str, Any]) -> BurgersRun | KuramotoSivashinskyRun:
    """A whole configuration; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": problem(name),
        "model": {"channels": 4, "layers": 3, "kernel_size": 3, "activation": "tanh"},
        "solver": {
            "method": "arkimex_3",
            "step_size": CASES[name]["step"],
            "petsc_options": {"snes_type": "ksponly", "ksp_type": "preonly", "pc_type": "redundant"},
        },
        "training": {"epochs": 2, "batch_size": 2},
        "evaluation": {"leads": (1, 2, 4)},
    }
    for table, changes in tables.items():
        whole[table] = whole.get(table, {}) | changes
    kind = BurgersRun if name == "burgers" else KuramotoSivashinskyRun
    return kind.model_validate(whole)


def linear_matrix(name: str, points: int = POINTS) -> Array:
    """a u_xx + b u_xxxx as a dense matrix, by np.roll of the identity."""
    case = CASES[name]
    spacing = case["length"] / points
    identity = np.eye(points)
    second = (np.roll(identity, 1, 0) - 2 * identity + np.roll(identity, -1, 0)) / spacing**2
    return np.asarray(case["second"] * second + case["fourth"] * second @ second)


def convection(name: str, state: Any, scale: float = 1.0) -> Any:
    """-(u^2 / 2)_x of whole periodic states `[..., point]` in units of `scale`; numpy or torch."""
    spacing = CASES[name]["length"] / state.shape[-1]
    roll = torch.roll if isinstance(state, torch.Tensor) else np.roll
    flux = scale * state**2 / 2
    return -(roll(flux, -1, -1) - roll(flux, 1, -1)) / (2 * spacing)


def trajectory(name: str, initial: Array, times: Array) -> Array:
    """The states `[time, point]` at `times` from a whole initial state at 0, by scipy's implicit Radau integrator."""
    matrix = linear_matrix(name, len(initial))

    def jacobian(t: float, u: Array) -> Array:
        spacing = CASES[name]["length"] / len(u)
        upper = np.roll(np.eye(len(u)), 1, 1) * np.roll(u, -1)
        lower = np.roll(np.eye(len(u)), -1, 1) * np.roll(u, 1)
        return np.asarray(matrix + (lower - upper) / (2 * spacing))

    solved = solve_ivp(
        lambda t, u: matrix @ u + convection(name, u),
        (0.0, float(times[-1])),
        initial,
        method="Radau",
        jac=jacobian,
        t_eval=times,
        rtol=1e-11,
        atol=1e-11,
    )
    return np.asarray(solved.y.T)


def term(name: str, parameters: Mapping[str, torch.Tensor], scale: float, state: torch.Tensor) -> torch.Tensor:
    """The learnt convection with activation tanh and kernels of 3 on whole states `[window, point]`."""

    def convolved(x: torch.Tensor, layer: str) -> torch.Tensor:
        wide = functional.pad(x, (1, 1), mode="circular")
        return functional.conv1d(wide, parameters[f"{layer}.weight"], parameters[f"{layer}.bias"])

    x = torch.tanh(convolved(state[:, None], "hidden.0"))
    for number in range(1, sum(key.endswith("weight") for key in parameters) - 1):
        x = x + torch.tanh(convolved(x, f"hidden.{number}"))
    flux = convolved(x, "output")[:, 0]
    spacing = CASES[name]["length"] / state.shape[-1]
    return -scale * (flux.roll(-1, -1) - flux.roll(1, -1)) / (2 * spacing)


def rollout(
    name: str, explicit: Callable[[torch.Tensor], torch.Tensor], initial: torch.Tensor, leads: int
) -> torch.Tensor:
    """The states `[lead, window, point]` of the equation's linear part and an `explicit` term, by ARK3(2)4L[2]SA in
    plain torch with dense Jacobians."""
    case, matrix = CASES[name], torch.from_numpy(linear_matrix(name, initial.shape[-1]))
    times = [lead * case["interval"] for lead in range(leads + 1)]
    states = odeint_implicit(
        lambda t, u: u @ matrix.T,
        initial,
        times,
        ARKIMEX["3"],
        case["step"],
        explicit=lambda t, u: explicit(u),
    )
    return states[1:]
