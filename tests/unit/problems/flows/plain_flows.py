"""Continuous flows in plain torch: layers by their formula, traces by autograd, steps of RK4; small configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pnode_dist.problems.flows.config import FlowsRun
from pnode_dist.problems.flows.model import ContinuousFlow

STEPS, TIME = 4, 0.8
Parameters = Mapping[str, torch.Tensor]
Field = Callable[[float, torch.Tensor], torch.Tensor]
ACTIVATIONS = {"tanh": torch.tanh, "softplus": torch.nn.functional.softplus, "silu": torch.nn.functional.silu}


def velocity(parameters: Parameters, activation: str, t: float, x: torch.Tensor) -> torch.Tensor:
    """The concatsquash perceptron whose parameters are named as a `ConcatSquashPerceptron` names them."""
    count = 1 + max(int(name.split(".")[1]) for name in parameters)
    for number in range(count):
        weight, bias, gate, offset, shift = (
            parameters[f"layers.{number}.{name}"]
            for name in ("linear.weight", "linear.bias", "gate", "gate_bias", "shift")
        )
        x = (x @ weight.T + bias) / (1 + torch.exp(-(gate * t + offset))) + shift * t
        if number < count - 1:
            x = ACTIVATIONS[activation](x)
    return x


def jacobians(field: Field, t: float, z: torch.Tensor) -> torch.Tensor:
    """dv_i/dz_j `[sample, i, j]`, a row at a time by autograd; differentiable."""
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        v = field(t, z)
        rows = [torch.autograd.grad(v[:, i].sum(), z, create_graph=True)[0] for i in range(v.shape[1])]
    return torch.stack(rows, dim=1)


def rates(
    field: Field, t: float, z: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dz/dt, d log p/dt, and what |v|^2 and the Jacobian's squared norm add up by."""
    full = jacobians(field, t, z)
    v = field(t, z)
    if noise is None:
        trace, norm = full.diagonal(dim1=1, dim2=2).sum(-1), full.square().sum(dim=(1, 2))
    else:
        along = torch.einsum("nij,nj->ni", full, noise)
        trace, norm = (noise * along).sum(-1), along.square().sum(-1)
    return v, -trace, v.square().sum(-1), norm


def rk4(
    field: Field, z: torch.Tensor, begin: float, end: float, steps: int, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """z, the change of log p, and both charges, after so many steps of the classical method from `begin` to `end`."""
    h = (end - begin) / steps
    zero = torch.zeros(len(z), dtype=z.dtype)
    state = (z, zero, zero, zero)

    def moved(along: tuple[torch.Tensor, ...], size: float) -> tuple[torch.Tensor, ...]:
        return tuple(part + size * rate for part, rate in zip(state, along, strict=True))

    for number in range(steps):
        t = begin + number * h
        k1 = rates(field, t, state[0], noise)
        k2 = rates(field, t + h / 2, moved(k1, h / 2)[0], noise)
        k3 = rates(field, t + h / 2, moved(k2, h / 2)[0], noise)
        k4 = rates(field, t + h, moved(k3, h)[0], noise)
        mean = tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
        state = moved(mean, h)
    return state


def standard_normal(z: torch.Tensor) -> torch.Tensor:
    """The log density of independent standard normal entries."""
    return -(z**2).sum(-1) / 2 - z.shape[1] * math.log(math.sqrt(2 * math.pi))


def problem(**changes: Any) -> dict[str, Any]:
    """The table `[problem]` of a small problem."""
    return {"type": "flows", "density": "moons", "samples": 23, "validation": 11, "test": 13} | changes


def config(**tables: dict[str, Any]) -> FlowsRun:
    """A whole configuration; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "seed": 3},
        "problem": problem(),
        "model": {"hidden": (5, 4), "time": TIME},
        "solver": {"method": "rk4", "step_size": TIME / STEPS},
        "training": {"epochs": 2, "batch_size": 9, "dtype": "float64"},
        "evaluation": {"samples": 7, "cells": 6},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return FlowsRun.model_validate(whole)


def leaves_of(model: ContinuousFlow) -> list[dict[str, torch.Tensor]]:
    """Copies of the parameters of each flow, named as in its network."""
    return [
        {
            name.removeprefix("func.velocity."): value.detach().clone().requires_grad_()
            for name, value in solve.named_parameters()
        }
        for solve in model.solves
    ]


def density(
    flows: list[dict[str, torch.Tensor]], samples: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The base points, the log densities and both charges of samples, by `STEPS` steps of each flow."""
    z, change, kinetic, jacobian = samples, 0.0, 0.0, 0.0
    for own in flows:
        z, *parts = rk4(lambda t, z, own=own: velocity(own, "tanh", t, z), z, 0.0, TIME, STEPS, noise)
        change, kinetic, jacobian = change + parts[0], kinetic + parts[1], jacobian + parts[2]
    return z, standard_normal(z) - change, kinetic, jacobian


def sampled(flows: list[dict[str, torch.Tensor]], base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples that noise becomes, and their log densities."""
    z, log_density = base, standard_normal(base)
    for own in reversed(flows):
        z, change, *_ = rk4(lambda t, z, own=own: velocity(own, "tanh", t, z), z, TIME, 0.0, STEPS)
        log_density = log_density + change
    return z, log_density
