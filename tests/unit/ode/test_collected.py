"""Models that solve with a method of their own are collected once they are dropped, whatever the solve was for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE

METHODS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "step_size": 0.5},
    "dopri5": {"method": "dopri5", "rtol": 1e-2},
    "cn": {"method": "cn", "step_size": 0.5},
    "cn adaptive": {"method": "cn", "rtol": 1e-2},
    "arkimex": {"method": "arkimex_3", "step_size": 0.5},
    "dirk": {"method": "dirk_es213sal", "step_size": 0.5},
    "irk": {"method": "radau3", "step_size": 0.5, "newton": "petsc"},
}
USES = ["reversed", "dropped", "without a gradient", "twice", "raised"]


class Model(nn.Module):
    """Its right-hand side is a method of its own, so that model and solvers refer to one another."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))
        self.raises = False
        self.node = NeuralODE(self.slope, params=[self.rate], **settings)

    def slope(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if self.raises:
            raise ArithmeticError
        return -self.rate * u

    def forward(self, u0: torch.Tensor) -> torch.Tensor:
        return self.node(u0, [0.0, 1.0])[-1].sum()


def used(settings: dict[str, Any], use: str) -> weakref.ref[Model]:
    model, u0 = Model(settings), torch.ones(3, dtype=torch.float64)
    model.raises = use == "raised"
    if use == "without a gradient":
        with torch.no_grad():
            model(u0)
    elif use == "raised":
        with pytest.raises(ArithmeticError):
            model(u0)
    else:
        value = model(u0)
        if use == "twice":
            value = value + model(u0)
        if use != "dropped":
            value.backward()
    return weakref.ref(model)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_is_dropped_is_collected(name: str, use: str) -> None:
    model = used(METHODS[name], use)
    gc.collect()
    assert model() is None
