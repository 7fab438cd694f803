from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torchdiffeq
from torch import nn

from pnode_dist.bench import gradient


class Growth(nn.Module):
    def forward(self, t, u):
        return u


def test_the_plain_reference_is_of_fourth_order():
    u0 = torch.ones(1, dtype=torch.float64)
    errors = [abs(gradient.classical_rk4(Growth(), u0, steps).item() - math.e) for steps in (8, 16, 32)]

    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([4, 4], abs=0.1)


def test_a_measured_case_has_the_exact_gradient_and_the_ratios_of_its_seconds():
    row = gradient.measure(gradient.Case(8, 2, 8, 5), torchdiffeq.odeint, torchdiffeq.odeint_adjoint)

    assert row["gradient_error"] <= 1e-12
    assert row["over_adjoint"] == row["pnode_dist"] / row["torchdiffeq_adjoint"]
    assert row["over_backprop"] == row["pnode_dist"] / row["torchdiffeq_backprop"]
