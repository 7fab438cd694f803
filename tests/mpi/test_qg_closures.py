"""Closures of the quasi-geostrophic problem at every number of ranks: values and gradients of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pnode_dist import GridPartition, Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.exchange import global_sum
from pnode_dist.problems.qg.closures import NAMES, Scales, closure, scales_of
from tests.mpi.grids import block
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

SHAPE = (8, 12)
SCALES = Scales((2.0, 0.5), (3.0, 1.0), (0.7, 0.2), (0.3, 0.1))


def plane(mesh: Mesh) -> GridPartition:
    return GridPartition(mesh, SHAPE, 2, "periodic", 2, processes=(mesh.size, 1))


def fields() -> list[torch.Tensor]:
    return [random(2, *SHAPE, 2, seed=seed) for seed in (1, 2, 3)]


def circular(state: dict[str, torch.Tensor], prefix: str, x: torch.Tensor) -> torch.Tensor:
    """A convolution of torch with circular padding, `[sample, channel, y, x]`."""
    weight = state[f"{prefix}.weight"]
    width = weight.shape[-1] // 2
    return functional.conv2d(functional.pad(x, (width,) * 4, "circular"), weight, state.get(f"{prefix}.bias"))


def plain(name: str, state: dict[str, torch.Tensor], q: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The closure of the whole field in plain torch, without momentum."""
    scale = torch.tensor([*SCALES.q, *SCALES.u, *SCALES.v], dtype=torch.float64)
    x = (torch.cat([q, u, v], -1) / scale).movedim(-1, 1)
    if name == "cnn":
        x = functional.silu(circular(state, "network.hidden.0", x))
        for number in (1, 2):
            x = x + functional.silu(circular(state, f"network.hidden.{number}", x))
    else:
        for number in range(7):
            x = circular(state, f"network.convolutions.{number}", x).relu()
            norm = nn.BatchNorm2d(x.shape[1], eps=0, dtype=torch.float64).eval()
            # Of running mean 0 and variance 1.
            x = functional.batch_norm(
                x,
                norm.running_mean,
                norm.running_var,
                state[f"network.norms.{number}.weight"],
                state.get(f"network.norms.{number}.bias"),
                eps=0,
            )
    x = circular(state, "network.output", x).movedim(1, -1)
    return (x - x.mean((1, 2), keepdim=True)) * torch.tensor(SCALES.forcing, dtype=torch.float64)


@pytest.mark.parametrize("name", ["cnn", "fcnn"])
def test_a_closure_and_its_gradients_are_those_of_plain_torch(name: str, mesh: Mesh) -> None:
    grid, whole = plane(mesh), fields()
    module = closure(name, grid, scales=SCALES, dtype=torch.float64, seed=4)
    weight = random(2, *SHAPE, 2, seed=9)

    state = {key: value.detach().clone().requires_grad_() for key, value in module.state_dict().items()}
    inputs = [field.clone().requires_grad_() for field in whole]
    wanted = plain(name, state, *inputs)
    keys = sorted(state)
    wanted_slopes = torch.autograd.grad((weight * wanted).sum(), [*inputs, *(state[key] for key in keys)])

    own = [block(grid, field).clone().requires_grad_() for field in whole]
    wrapped = parallel(module, mesh)
    found = wrapped(*own)
    assert distance(found.detach(), block(grid, wanted.detach())) < 1e-12
    (block(grid, weight) * found).sum().backward()
    for mine, slope in zip(own, wanted_slopes[:3], strict=True):
        assert mine.grad is not None
        assert distance(mine.grad, block(grid, slope)) < 1e-11
    found_slopes: dict[str, Any] = {key: value.grad for key, value in module.named_parameters()}
    for key, slope in zip(keys, wanted_slopes[3:], strict=True):
        assert distance(found_slopes[key], slope) < 1e-11


@pytest.mark.parametrize("name", ["cnn", "fcnn"])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_closure_adds_nothing_to_the_sum_over_the_domain(name: str, momentum: bool, mesh: Mesh) -> None:
    grid = plane(mesh)
    module = closure(name, grid, scales=SCALES, momentum=momentum, dtype=torch.float64)
    found = module(*(block(grid, field) for field in fields())).detach()
    total = global_sum(found.sum((-3, -2)), grid.comm)
    size = global_sum(found.abs().sum((-3, -2)), grid.comm)
    assert float((total / size).abs().max()) <= 1e-15


def test_momentum_is_a_flux_a_change_inside_leaves_far_points_alone(mesh: Mesh) -> None:
    grid = plane(mesh)
    module = closure("cnn", grid, layers=2, momentum=True, dtype=torch.float64)
    changed = fields()
    changed[0][:, 0, 0] += 1.0
    before, after = (module(*(block(grid, field) for field in given)).detach() for given in (fields(), changed))
    difference = grid.gather(after - before)
    if difference is not None:
        rows = difference.abs().amax((0, 2, 3))
        # Two convolutions and the differences: three points.
        assert bool((rows[4:5] == 0).all())
        assert bool((rows[[0, 1, 2, 3, 5, 6, 7]] > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_scales_and_closures_are_the_same_at_every_number_of_ranks(name: str, mesh: Mesh) -> None:
    whole = fields()
    scales = scales_of(plane(mesh), *(block(plane(mesh), field) for field in [*whole, whole[0]]))
    for key, field in zip(("q", "u", "v", "forcing"), [*whole, whole[0]], strict=True):
        assert getattr(scales, key) == pytest.approx(field.square().mean((0, 1, 2)).sqrt().tolist(), rel=1e-12)
    checksums = torch.tensor([float(value.detach().sum()) for value in closure(name, plane(mesh)).parameters()])
    assert torch.equal(mesh.max(checksums), checksums) if len(checksums) else name == "none"
