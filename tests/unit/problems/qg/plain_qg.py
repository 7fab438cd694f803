"""The quasi-geostrophic problem once more, on the whole grid in plain torch, layers last; small configurations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pnode_dist.problems.qg.config import EDDY, QGRun

COARSE, FINE = (8, 12), (16, 24)
LENGTH, STEP, INTERVAL = 4e5, 2.0, 4.0
TRAINING, VALIDATION, TIMES, WINDOW = 2, 1, 5, 2

Closure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def config(directory: Path, **tables: dict[str, Any]) -> QGRun:
    """A whole configuration, with its data in `directory`; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": {
            "type": "qg",
            "shape": COARSE,
            "fine": FINE,
            "L": LENGTH,
            "fine_step": STEP,
            "interval": INTERVAL,
            "spin_up": 40.0,
            "amplitude": 1e-4,
            "trajectories": TRAINING,
            "validation": VALIDATION,
            "times": TIMES,
            "window": WINDOW,
            "data": str(directory / "data"),
        },
        "model": {"channels": 4, "layers": 2},
        "solver": {"step_size": STEP},
        "training": {"epochs": 2, "batch_size": 2},
        "evaluation": {"leads": (1, 2, 4)},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return QGRun.model_validate(whole)


def _waves(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Radians per cell along y and x, `[ny, 1]` and `[nx // 2 + 1]`, float64."""
    ky = 2 * math.pi * torch.fft.fftfreq(shape[0], dtype=torch.float64)
    kx = 2 * math.pi * torch.fft.rfftfreq(shape[1], dtype=torch.float64)
    return ky[:, None], kx


def _transformed(field: torch.Tensor) -> torch.Tensor:
    return torch.fft.rfft2(field, dim=(-3, -2))


def _restored(spectral: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return torch.fft.irfft2(spectral, shape, dim=(-3, -2))


def velocities(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocities in m/s of whole fields `[..., ny, nx, 2]` on the domain of `LENGTH`."""
    shape = q.shape[-3], q.shape[-2]
    psi = _streamfunction(q)
    ky, kx = (k * shape[1] / LENGTH for k in _waves(shape))
    return _restored(-1j * ky[..., None] * psi, shape), _restored(1j * kx[:, None] * psi, shape)


def _streamfunction(q: torch.Tensor) -> torch.Tensor:
    shape = q.shape[-3], q.shape[-2]
    ky, kx = (k * shape[1] / LENGTH for k in _waves(shape))
    square = kx**2 + ky**2
    upper = EDDY.rd**-2 / (1 + EDDY.delta)
    lower = EDDY.delta * upper
    matrices = torch.stack([-square - upper, 0 * square + upper, 0 * square + lower, -square - lower], dim=-1)
    matrices = matrices.unflatten(-1, (2, 2)).clone()
    matrices[0, 0] = torch.eye(2, dtype=torch.float64)
    spectral = _transformed(q)
    mask = torch.ones(*square.shape, 1, dtype=torch.float64)
    mask[0, 0] = 0
    solved = torch.linalg.solve(matrices.to(spectral.dtype), (mask * spectral)[..., None])
    return solved[..., 0]


def tendency(q: torch.Tensor, closure: Closure | None = None) -> torch.Tensor:
    """dq/dt in 1/s^2 of whole fields in the eddy configuration."""
    shape = q.shape[-3], q.shape[-2]
    ky, kx = (k * shape[1] / LENGTH for k in _waves(shape))
    psi = _streamfunction(q)
    u, v = velocities(q)
    mean = torch.tensor([EDDY.U1, EDDY.U2], dtype=torch.float64)
    upper = EDDY.rd**-2 / (1 + EDDY.delta)
    shear = EDDY.U1 - EDDY.U2
    gradient = EDDY.beta + shear * torch.tensor([upper, -EDDY.delta * upper], dtype=torch.float64)
    advection = 1j * kx[:, None] * _transformed((u + mean) * q) + 1j * ky[..., None] * _transformed(v * q)
    drag = torch.tensor([0.0, EDDY.rek], dtype=torch.float64) * (kx**2 + ky**2)[..., None]
    rate = _restored(drag * psi - advection - 1j * kx[:, None] * gradient * psi, shape)
    return rate if closure is None else rate + closure(q, u, v)


def damped(q: torch.Tensor) -> torch.Tensor:
    """Whole fields after the filter of small scales."""
    return _weighted(q, lambda beyond: torch.exp(-EDDY.filterfac * beyond**4))


def resolved(q: torch.Tensor) -> torch.Tensor:
    """The part of whole fields that the filter leaves unchanged."""
    return _weighted(q, lambda beyond: (beyond == 0).double())


def _weighted(q: torch.Tensor, weight: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    shape = q.shape[-3], q.shape[-2]
    ky, kx = _waves(shape)
    beyond = ((ky**2 + kx**2).sqrt() - 0.65 * math.pi).clamp(min=0)
    return _restored(_transformed(q) * weight(beyond)[..., None], shape)


def rollout(
    initial: torch.Tensor, scale: torch.Tensor, leads: int, closure: Closure | None = None, applied: str = "stages"
) -> torch.Tensor:
    """States `[lead, window, y, x, 2]` in units of `scale`, by Runge-Kutta steps with the filter after each.

    The closure is a part of the tendency, or with `applied="steps"` an Euler step of its own before the filter.
    """
    q, found, size = initial * scale, [], STEP * 3600
    inside = closure if applied == "stages" else None
    for _ in range(leads):
        for _ in range(round(INTERVAL / STEP)):
            first = tendency(q, inside)
            second = tendency(q + size / 2 * first, inside)
            third = tendency(q + size / 2 * second, inside)
            fourth = tendency(q + size * third, inside)
            q = q + size / 6 * (first + 2 * second + 2 * third + fourth)
            if applied == "steps" and closure is not None:
                q = q + size * closure(q, *velocities(q))
            q = damped(q)
        found.append(q / scale)
    return torch.stack(found)
