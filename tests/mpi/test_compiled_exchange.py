"""Exchanges and layers in compiled code: in one graph, with the values and gradients of code that is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.utils.checkpoint import checkpoint

from pnode_dist import DensePartition, GraphPartition, GridPartition, Mesh
from pnode_dist.exchange import (
    gather,
    gather_vector,
    global_sum,
    halo,
    mesh_sum,
    neighbour_halo,
    pad_edges,
    reduce_vector,
    scatter,
    with_ghosts,
)
from pnode_dist.nn import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    GlobalMean,
    GraphConv,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    MessagePassing,
    Stack,
    SyncBatchNorm,
    Upsample,
)
from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.mpi.grids import block
from tests.oracles.graphs import random_edges
from tests.oracles.right_hand_sides import distance, random

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.slow,
    pytest.mark.skipif(not TRACES_OBJECTS, reason="this torch cannot compile exchanges"),
]

SHAPE = (11, 7)
RULES = [("periodic", "zero"), (1.5, "reflect"), ("replicate", -0.5)]
Function = Callable[[torch.Tensor], torch.Tensor]


def nightly(name: str) -> Any:
    """A case that others stand for by day."""
    return pytest.param(name, marks=pytest.mark.nightly)


def grid(mesh: Mesh, boundary: Any = ("periodic", 1.5), shape: tuple[int, ...] = SHAPE) -> GridPartition:
    return GridPartition(mesh, shape, channels=2, boundary=boundary, multiple_of=1)


def field(partition: GridPartition, *leading: int) -> torch.Tensor:
    return block(partition, random(*leading, *partition.shape, 2)).clone()


def gradients(function: Function, x: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The value and its gradients, with weights that differ between ranks."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    weight = random(*y.shape, seed=MPI.COMM_WORLD.rank)
    found = torch.autograd.grad((weight * y.square()).sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


def assert_same_when_compiled(function: Function, x: torch.Tensor, backend: Any = "aot_eager") -> None:
    parameters: list[torch.Tensor] = list(function.parameters()) if isinstance(function, nn.Module) else []
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    wanted, found = gradients(function, x, parameters), gradients(compiled, x, parameters)
    for mine, theirs in zip(found, wanted, strict=True):
        assert distance(mine, theirs) <= 1e-12


@pytest.mark.nightly
@pytest.mark.parametrize("boundary", RULES, ids=str)
@pytest.mark.parametrize("kind", [halo, neighbour_halo, pad_edges], ids=lambda kind: kind.__name__)
def test_a_compiled_halo_is_that_of_code_that_is_not_compiled(kind: Any, boundary: Any, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=2)
    assert_same_when_compiled(lambda x: kind(x.sin(), partition, ((1, 2), 1)), field(partition, 3))


@pytest.mark.nightly
def test_compiled_code_follows_a_partition_that_is_replaced(mesh: Mesh) -> None:
    compiled = torch.compile(lambda x, partition: halo(x, partition), fullgraph=True, backend="aot_eager")
    for boundary in ("periodic", "replicate", "periodic"):
        partition = grid(mesh, boundary)
        assert torch.equal(compiled(field(partition), partition), halo(field(partition), partition))


def exchanges(mesh: Mesh) -> dict[str, tuple[Function, torch.Tensor]]:
    edges = random_edges(17, 60)
    graph = GraphPartition(mesh, edges, 17, 2)
    vector = DensePartition(mesh, 7)
    partition = grid(mesh)
    nodes, part = random(3, *graph.local_shape), random(3, *vector.local_shape, seed=mesh.rank)
    return {
        "with_ghosts": (lambda x: with_ghosts(x.sin(), graph), nodes),
        "gather_vector": (lambda x: gather_vector(x.sin(), vector), part),
        "reduce_vector": (lambda x: reduce_vector(x.sin(), vector), random(3, 7, seed=mesh.rank)),
        "global_sum": (lambda x: global_sum(x.sin().mT, partition.comm), random(3, 2, seed=mesh.rank)),
        "mesh_sum": (lambda x: mesh_sum(x.sin().mT, mesh, "state"), random(3, 2, seed=mesh.rank)),
        "gather": (lambda x: gather(x.sin(), partition), field(partition, 3)),
        "scatter": (lambda x: scatter(x.sin(), partition), random(3, *partition.global_shape)),
    }


EXCHANGES = ("with_ghosts", "gather_vector", "reduce_vector", "global_sum", "mesh_sum", "gather", "scatter")


@pytest.mark.parametrize("name", [name if name == "global_sum" else nightly(name) for name in EXCHANGES])
def test_a_compiled_exchange_is_that_of_code_that_is_not_compiled(name: str, mesh: Mesh) -> None:
    assert_same_when_compiled(*exchanges(mesh)[name])


def layers(mesh: Mesh) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    partition, even = grid(mesh), GridPartition(mesh, (16, 12), channels=2, boundary="replicate", multiple_of=2)
    graph = GraphPartition(mesh, random_edges(17, 60), 17, 2)
    vectors = DensePartition(mesh, 7), DensePartition(mesh, 3)
    f64 = torch.float64
    x, fine, nodes = field(partition, 3), field(even, 3), random(3, *graph.local_shape)
    part, samples = random(3, *vectors[0].local_shape, seed=mesh.rank), random(3 + mesh.rank, 2, 5, seed=mesh.rank)
    convolutions = Conv2d(partition, 2, 3, dtype=f64), nn.Tanh(), Conv2d(partition, 3, 2, dtype=f64)
    return {
        "Conv2d": (Conv2d(partition, 2, 2, dtype=f64), x),
        "Stack layer": (Stack(partition, *convolutions), x),
        "Stack once": (Stack(partition, *convolutions, exchange="once"), x),
        "Stack auto": (Stack(partition, *convolutions, exchange="auto"), x),
        "GroupNorm": (GroupNorm(partition, 2, 2, dtype=f64), x),
        "LayerNorm": (LayerNorm(partition, 2, dtype=f64), x),
        "BatchNorm2d": (BatchNorm2d(partition, 2, momentum=None, dtype=f64), x),
        "GlobalMean": (GlobalMean(partition), x),
        "SyncBatchNorm": (SyncBatchNorm(mesh, 2, dtype=f64), samples),
        "AvgPool2d": (AvgPool2d(even, 2), fine),
        "MaxPool2d": (MaxPool2d(even, 2), fine),
        "Upsample": (Upsample(partition, 2, "bilinear"), x),
        "Linear column": (Linear(*vectors, dtype=f64, split="column"), part),
        "Linear row": (Linear(*vectors, dtype=f64, split="row"), part),
        "GraphConv": (GraphConv(graph, 2, 3, dtype=f64), nodes),
        "mean": (MessagePassing(graph, lambda target, source: target * source.sin(), "mean"), nodes),
        "max": (MessagePassing(graph, lambda target, source: target * source.sin(), "max"), nodes),
    }


LAYERS = (
    *("Conv2d", "Stack layer", "Stack once", "Stack auto", "GroupNorm", "LayerNorm", "BatchNorm2d", "GlobalMean"),
    *("SyncBatchNorm", "AvgPool2d", "MaxPool2d", "Upsample", "Linear column", "Linear row", "GraphConv", "mean", "max"),
)


@pytest.mark.parametrize("name", [name if name == "Conv2d" else nightly(name) for name in LAYERS])
def test_a_layer_is_one_graph_with_the_gradients_of_the_layer(name: str, mesh: Mesh) -> None:
    assert_same_when_compiled(*layers(mesh)[name])


@pytest.mark.nightly
def test_errors_of_exchanges_are_raised_when_code_is_compiled(mesh: Mesh) -> None:
    partition = grid(mesh)
    wrong = {
        "halo: width": lambda x: halo(x, partition, 9),
        "halo: got shape": lambda x: halo(x[..., :1, :, :], partition),
        "scatter: got shape": lambda x: scatter(x[0, 0], partition),
        "in a function that is traced by itself": lambda x: checkpoint(
            lambda y: halo(y.sin(), partition), x, use_reentrant=False
        ),
        "in torch.func inside torch.compile": lambda x: torch.func.grad(lambda y: halo(y, partition).sum())(x),
    }
    for message, function in wrong.items():
        torch.compiler.reset()
        with pytest.raises(Exception, match=message):
            torch.compile(function, fullgraph=True, backend="aot_eager")(field(partition))


@pytest.mark.nightly
def test_a_batch_norm_refuses_a_single_value_in_compiled_code(mesh: Mesh) -> None:
    samples = random(1 if mesh.rank == 0 else 0, 2)
    layer = torch.compile(SyncBatchNorm(mesh, 2, dtype=torch.float64), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"SyncBatchNorm: 1 value\(s\) in a channel have no variance"):
        layer(samples)
