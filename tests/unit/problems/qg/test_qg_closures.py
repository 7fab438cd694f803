"""Closures of the quasi-geostrophic problem: sizes, initial values, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.closures import ChannelScale, Scales, closure, stress_curl
from tests.oracles.right_hand_sides import distance, random


def plane() -> GridPartition:
    return GridPartition(MPI.COMM_SELF, (8, 10), 2, "periodic", 2)


def count(name: str, **sizes: Any) -> int:
    return sum(value.numel() for value in closure(name, plane(), **sizes).parameters())


def test_the_networks_have_the_sizes_that_their_docstrings_state() -> None:
    # Weights and biases of each convolution, and two numbers for each normalised channel.
    assert count("cnn") == (54 * 32 + 32) + 2 * (288 * 32 + 32) + 288 * 2
    full = (150 * 128 + 128) + (3200 * 64 + 64) + (576 * 32 + 32) + 4 * (288 * 32 + 32) + 288 * 2
    assert count("fcnn") == full + 2 * (128 + 64 + 5 * 32) - 32
    assert count("cnn", channels=3, layers=2, kernel=5, inputs="q", momentum=True) == (50 * 3 + 3) + 75 * 4
    assert count("none") == 0


def test_no_closure_is_zero() -> None:
    q = random(8, 10, 2)
    assert torch.equal(closure("none", plane())(q, q, q), torch.zeros(8, 10, 2, dtype=torch.float64))


def test_channel_scale_normalises_the_positive_parts_of_normal_numbers() -> None:
    found = ChannelScale(3, torch.float64)(random(40000, 3).relu()).detach()
    assert abs(float(found.mean())) < 0.02
    assert abs(float(found.std()) - 1) < 0.02


def test_the_signals_inside_the_benchmark_network_keep_their_size() -> None:
    grid = GridPartition(MPI.COMM_SELF, (16, 16), 2, "periodic", 2)
    network: Any = closure("fcnn", grid, dtype=torch.float64).network
    x = random(4, 16, 16, 6)
    for convolution, norm in zip(network.convolutions, network.norms, strict=True):
        x = norm(convolution(x).relu())
        assert 0.6 < float(x.detach().std()) < 1.6


@pytest.mark.parametrize("name", ["cnn", "fcnn"])
def test_parameters_follow_the_seed_and_round_to_any_type(name: str) -> None:
    first, same, other = (closure(name, plane(), seed=seed, dtype=torch.float64).state_dict() for seed in (1, 1, 2))
    single = closure(name, plane(), seed=1, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert all(torch.equal(value.float(), single[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_building_a_closure_leaves_the_random_numbers_of_the_program_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    closure("fcnn", plane())
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("momentum", [False, True])
def test_the_output_has_the_units_and_the_type_of_the_state(momentum: bool) -> None:
    scales = Scales((1e-5, 2e-6), (0.05, 0.01), (0.04, 0.02), (3e-12, 4e-13))
    q, u, v = random(3, 8, 10, 2), random(3, 8, 10, 2, seed=2), random(3, 8, 10, 2, seed=3)
    plain = closure("cnn", plane(), momentum=momentum, dtype=torch.float64)(q, u, v)
    given = [
        field * torch.tensor(scale) for field, scale in zip((q, u, v), (scales.q, scales.u, scales.v), strict=True)
    ]
    found = closure("cnn", plane(), momentum=momentum, scales=scales, dtype=torch.float64)(*given)
    assert distance(found / torch.tensor(scales.forcing, dtype=torch.float64), plain) < 1e-7
    single = closure("cnn", plane(), momentum=momentum, scales=scales)(*given)
    assert single.dtype == torch.float64
    assert distance(single, found) < 1e-5


def test_the_stress_curl_is_the_published_operator_on_a_plane_wave() -> None:
    # Differences of a wave exp(i (k x + l y)) are known: sin k sin l for d2/dxdy, and 2 cos k - 2 for d2/dx2.
    along_x, along_y = 2 * torch.pi * 2 / 10, 2 * torch.pi * 3 / 8
    y, x = torch.meshgrid(torch.arange(8, dtype=torch.float64), torch.arange(10, dtype=torch.float64), indexing="ij")
    wave = torch.cos(along_x * x + along_y * y)
    stress = torch.stack([wave, 2 * wave, 3 * wave, 4 * wave], dim=-1)
    mixed = -math.sin(along_x) * math.sin(along_y) * wave
    difference = 2 * (math.cos(along_x) - math.cos(along_y)) * wave
    wanted = torch.stack([mixed + 3 * difference, 2 * mixed + 4 * difference], dim=-1)
    assert distance(stress_curl(stress, plane()), wanted) < 1e-13


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("unet", {}, r"\[model\] closure = 'unet': must be one of none, cnn, fcnn"),
        ("cnn", {"kernel": 4}, r"\[model\] kernel = 4: must be odd and at least 1"),
        ("cnn", {"layers": 1}, r"\[model\] layers = 1: must be at least 2"),
        ("cnn", {"channels": 0}, r"\[model\] channels = 0: must be at least 1"),
        ("cnn", {"inputs": "uv"}, r"\[model\] inputs = 'uv': must be one of quv, q"),
        ("fcnn", {"channels": 64}, r"\[model\] channels = 64: is for closure = 'cnn', and closure = 'fcnn'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        closure(name, plane(), **given)


def test_a_grid_with_walls_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"closure: partition has boundary = \('zero', 'zero'\), channels = 2"):
        closure("cnn", GridPartition(MPI.COMM_SELF, (8, 8), 2))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ConfigurationError, match=r"scales: v = \(1\.0, .*\): must be two positive numbers"):
        Scales(v=(1.0, scale))
