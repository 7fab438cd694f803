"""A convolution split over ranks is torch's convolution of the whole field."""

from itertools import product
from typing import Any

import pytest
import torch

from pnode_dist import GridPartition, Mesh
from pnode_dist.nn import Conv2d
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

RULES = ("periodic", "replicate", "zero")
SHAPE = (13, 17)


def layer(partition: GridPartition, dtype: torch.dtype = torch.float64, **settings: Any) -> Conv2d:
    torch.manual_seed(3)
    return Conv2d(partition, 2, 4, dtype=dtype, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 5},
        {"dilation": 2},
        {"kernel_size": 5, "dilation": 2},
        {"kernel_size": (1, 3), "dilation": (1, 3)},
        {"kernel_size": 1, "bias": False},
    ],
    ids=["3", "5", "3 dilated", "5 dilated", "1x3", "1"],
)
@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_outputs_and_gradients_are_torch_s(boundary: tuple[str, str], settings: dict[str, Any], mesh: Mesh) -> None:
    # 4 is what the widest of these kernels needs.
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=4)
    conv = layer(partition, **settings)
    whole = random(3, *SHAPE, 2).requires_grad_()
    parameters = list(conv.parameters())
    serial = convolved(whole, boundary, conv.weight, conv.bias, conv.dilation)
    weight = random(*serial.shape, seed=9)
    wanted = torch.autograd.grad((weight * serial).sum(), [whole, *parameters])

    local = partition.scatter(whole).requires_grad_()
    found = conv(local)
    assert distance(found, partition_of(serial, partition)) <= 1e-12
    share = (partition_of(weight, partition) * found).sum()
    gradients = torch.autograd.grad(share, [local, *parameters])
    assert distance(gradients[0], partition_of(wanted[0], partition)) <= 1e-12
    for gradient, whole_gradient in zip(gradients[1:], wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), whole_gradient) <= 1e-12


def partition_of(whole: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    (y0, y1), (x0, x1) = partition.owned
    return whole.detach()[..., y0:y1, x0:x1, :]


def test_its_parameters_are_those_of_torch_nn_conv2d(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2)
    torch.manual_seed(3)
    model = torch.nn.Conv2d(2, 4, 3, dtype=torch.float64)
    conv = layer(partition)
    assert {k: v.shape for k, v in conv.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert torch.equal(conv.weight, model.weight)
    other = layer(partition)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(conv.state_dict())


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_any_number_of_batch_axes_is_taken(leading: tuple[int, ...], mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("replicate", "periodic"))
    conv = layer(partition)
    whole = random(*leading, *SHAPE, 2)
    wanted = convolved(whole.reshape(-1, *SHAPE, 2), partition.boundary, conv.weight, conv.bias)
    found = conv(partition.scatter(whole))
    assert distance(found, partition_of(wanted.reshape(*leading, *SHAPE, 4), partition)) <= 1e-12


def test_float32_stays_float32(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2)
    conv = layer(partition, dtype=torch.float32)
    whole = random(1, *SHAPE, 2, dtype=torch.float32)
    found = conv(partition.scatter(whole))
    assert found.dtype == torch.float32
    exact = conv.double()
    wanted = convolved(whole.double(), partition.boundary, exact.weight, exact.bias)
    assert distance(found.double(), partition_of(wanted, partition)) <= 1e-6


@pytest.mark.parametrize("kernel_size", [2, (3, 4)])
def test_an_even_kernel_is_refused(kernel_size: object, mesh: Mesh) -> None:
    with pytest.raises(ValueError, match=r"kernel_size = .*must be odd"):
        layer(GridPartition(mesh, SHAPE, channels=2), kernel_size=kernel_size)
