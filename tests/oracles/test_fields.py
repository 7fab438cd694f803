"""Padding is numpy's and convolution torch's own, where they know the boundary rule."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tests.oracles.fields import convolved, padded
from tests.oracles.right_hand_sides import random

MODES: dict[str, Any] = {"periodic": "wrap", "replicate": "edge", "zero": "constant"}


@pytest.mark.parametrize("boundary", list(product(MODES, MODES)))
@pytest.mark.parametrize("width", [(1, 1), (2, 3), (0, 1), (3, 0)])
def test_padding_is_numpy_s(boundary: tuple[str, str], width: tuple[int, int]) -> None:
    field = random(2, 4, 5, 3)
    wanted = np.pad(field.numpy(), ((0, 0), (width[0],) * 2, (0, 0), (0, 0)), mode=MODES[boundary[0]])
    wanted = np.pad(wanted, ((0, 0), (0, 0), (width[1],) * 2, (0, 0)), mode=MODES[boundary[1]])
    assert np.array_equal(padded(field, boundary, width).numpy(), wanted)


@pytest.mark.parametrize(("rule", "mode"), [("periodic", "circular"), ("replicate", "replicate"), ("zero", "zeros")])
def test_convolution_is_torch_s(rule: str, mode: Any) -> None:
    layer = torch.nn.Conv2d(3, 2, 3, padding=2, dilation=2, padding_mode=mode, dtype=torch.float64)
    field = random(2, 7, 6, 3)
    wanted = layer(field.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    found = convolved(field, (rule, rule), layer.weight, layer.bias, dilation=(2, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)
