"""Message passing on a graph that is split over ranks is that on the whole of it, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import GraphPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn import GraphConv, MessagePassing
from tests.oracles.graphs import normalised_adjacency, passed, random_edges
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

NODES, EDGES, FEATURES, ATTRIBUTES, HIDDEN = 17, 60, 2, 3, 4


class Message(nn.Module):
    """tanh(W [x_i, x_j, e]): depends on both ends of an edge and on its attributes."""

    def __init__(self, attributes: int = ATTRIBUTES) -> None:
        super().__init__()
        self.layer = nn.Linear(2 * FEATURES + attributes, HIDDEN, dtype=torch.float64)

    def forward(self, target: torch.Tensor, source: torch.Tensor, *attributes: torch.Tensor) -> torch.Tensor:
        given = [value.expand(*target.shape[:-1], value.shape[-1]) for value in attributes]
        return torch.tanh(self.layer(torch.cat([target, source, *given], dim=-1)))


class Update(nn.Module):
    """x + tanh(W [x, m])."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES + HIDDEN, FEATURES, dtype=torch.float64)

    def forward(self, x: torch.Tensor, aggregated: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.layer(torch.cat([x, aggregated], dim=-1)))


@pytest.fixture(scope="module", params=["bisection", "all on the first"])
def partition(request: pytest.FixtureRequest, mesh: Mesh) -> GraphPartition:
    """Nodes everywhere, and ranks that own nothing."""
    ownership = request.param if request.param == "bisection" else [0] * NODES
    return GraphPartition(mesh, random_edges(NODES, EDGES), NODES, FEATURES, ownership)


@pytest.fixture
def edges() -> torch.Tensor:
    """The whole graph."""
    return random_edges(NODES, EDGES)


def assert_gradients_are_those_of_the_whole(
    found: torch.Tensor,
    local: list[torch.Tensor],
    wanted: torch.Tensor,
    whole: list[torch.Tensor],
    parts: list[Any],
    parameters: list[nn.Parameter],
    partition: GraphPartition,
    mesh: Mesh,
) -> None:
    """Values, gradients of the rank's `parts` of each input, and the ranks' sum of the parameters' gradients."""
    assert distance(found, wanted[..., partition.owned, :]) <= 1e-12
    weight = random(*wanted.shape, seed=9)
    expected = torch.autograd.grad((weight * wanted).sum(), [*whole, *parameters])
    gradients = torch.autograd.grad((weight[..., partition.owned, :] * found).sum(), [*local, *parameters])
    for gradient, whole_gradient, part in zip(gradients, expected, parts, strict=False):
        assert float((gradient - whole_gradient[..., part, :]).abs().sum()) <= 1e-12 * float(whole_gradient.abs().max())
    for gradient, total in zip(gradients[len(parts) :], expected[len(parts) :], strict=True):
        assert distance(mesh.sum(gradient), total) <= 1e-12


@pytest.mark.parametrize("leading", [(), (3,)], ids=str)
@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
def test_values_and_gradients_are_those_on_the_whole_graph(
    aggregate: Any, leading: tuple[int, ...], partition: GraphPartition, edges: torch.Tensor, mesh: Mesh
) -> None:
    layer = MessagePassing(partition, Message(), aggregate, Update())
    x, attributes = random(*leading, NODES, FEATURES).requires_grad_(), random(EDGES, ATTRIBUTES).requires_grad_()
    wanted = layer.update(x, passed(x, edges, layer.message, aggregate, attributes))
    own = x.detach()[..., partition.owned, :].requires_grad_()
    own_attributes = partition.scatter_edges(attributes).requires_grad_()
    assert_gradients_are_those_of_the_whole(
        layer(own, own_attributes),
        [own, own_attributes],
        wanted,
        [x, attributes],
        [partition.owned, partition.edges],
        list(layer.parameters()),
        partition,
        mesh,
    )


def test_functions_are_messages_too_and_a_node_without_edges_gets_0(
    partition: GraphPartition, edges: torch.Tensor
) -> None:
    def flow(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return source * target

    x = random(NODES, FEATURES)
    for aggregate in ("sum", "mean", "max"):
        found = MessagePassing(partition, flow, aggregate)(x[partition.owned])  # type: ignore[arg-type]
        wanted = passed(x, edges, flow, aggregate)
        assert distance(found, wanted[partition.owned]) <= 1e-12
        assert not wanted[-1].any()


def test_sums_have_the_same_bits_at_every_number_of_ranks(partition: GraphPartition, edges: torch.Tensor) -> None:
    def source_alone(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return source

    x = random(2, NODES, FEATURES)
    alone = MessagePassing(GraphPartition(MPI.COMM_SELF, edges, NODES), source_alone)
    assert torch.equal(MessagePassing(partition, source_alone)(x[:, partition.owned]), alone(x)[:, partition.owned])


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
def test_forward_mode_and_nested_derivatives_are_those_of_the_whole(
    aggregate: Any, partition: GraphPartition, edges: torch.Tensor
) -> None:
    layer = MessagePassing(partition, Message(0), aggregate)
    x, v, w = random(NODES, FEATURES), random(NODES, FEATURES, seed=2), random(NODES, HIDDEN, seed=3)
    own, direction, weight = x[partition.owned], v[partition.owned], w[partition.owned]
    wanted = torch.autograd.functional.jvp(lambda u: passed(u, edges, layer.message, aggregate), x, v)[1]
    found = torch.func.jvp(layer, (own,), (direction,))[1]
    assert distance(found, wanted[partition.owned]) <= 1e-12
    curvature = torch.autograd.functional.hvp(lambda u: (w * passed(u, edges, layer.message, aggregate)).sum(), x, v)[1]
    found = torch.func.jvp(lambda u: torch.func.vjp(layer, u)[1](weight)[0], (own,), (direction,))[1]
    assert distance(found, curvature[partition.owned]) <= 1e-12


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(2, 5), (5, 2)], ids=["wider", "narrower"])
def test_a_graph_convolution_is_the_product_with_the_normalised_adjacency(
    sizes: tuple[int, int], weighted: bool, partition: GraphPartition, edges: torch.Tensor, mesh: Mesh
) -> None:
    weights = random(EDGES).abs() if weighted else None
    own_weights = partition.scatter_edges(weights) if weighted else None
    layer = GraphConv(partition, *sizes, dtype=torch.float64, edge_weight=own_weights)
    torch.manual_seed(0)
    assert set(layer.state_dict()) == set(nn.Linear(*sizes).state_dict())
    x = random(3, NODES, sizes[0]).requires_grad_()
    assert layer.bias is not None
    wanted = normalised_adjacency(edges, NODES, weights) @ x @ layer.weight.T + layer.bias
    own = x.detach()[:, partition.owned].requires_grad_()
    assert_gradients_are_those_of_the_whole(
        layer(own), [own], wanted, [x], [partition.owned], list(layer.parameters()), partition, mesh
    )


class Diffusion(nn.Module):
    """du/dt = -10 u + 3 A(tanh(B(u))) over two message passings: coupled further than to the neighbours."""

    def __init__(self, partition: GraphPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = MessagePassing(partition, Message(0), "mean")
        self.outer = GraphConv(partition, HIDDEN, FEATURES, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = 3 * self.outer(self.inner(u)) - 10 * u
        return result


# Newton's method to rounding.
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-8, "ksp_atol": 1e-50}


@pytest.mark.parametrize(("method", "preconditioner"), [("rk4", None), ("cn", None), ("cn", "block")])
def test_a_solve_and_its_gradient_are_those_on_one_rank(
    method: str, preconditioner: str | None, partition: GraphPartition, edges: torch.Tensor, mesh: Mesh
) -> None:
    options = TIGHT if method != "rk4" else None
    x = random(NODES, FEATURES)

    def solve(place: GraphPartition, u0: torch.Tensor, mesh: Mesh | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        node: nn.Module = NeuralODE(
            Diffusion(place),
            method=method,
            step_size=0.1,
            partition=place,
            options=options,
            trajectory=Trajectory(ram_slots=2),
            preconditioner=preconditioner,
        )
        model = node if mesh is None else parallel(node, mesh)
        start = u0.clone().requires_grad_()
        final = model(start, [0.0, 0.2])[-1]
        final.sin().sum().backward()
        assert start.grad is not None
        gradients = [parameter.grad for parameter in node.parameters()]
        return torch.cat([final.detach(), start.grad], dim=-1), [g for g in gradients if g is not None]

    found, gradients = solve(partition, x[partition.owned], mesh)
    wanted, expected = solve(GraphPartition(MPI.COMM_SELF, edges, NODES, FEATURES), x, None)
    assert float((found - wanted[partition.owned]).abs().sum()) <= 1e-10
    assert len(gradients) == len(expected) == 4
    for gradient, total in zip(gradients, expected, strict=True):
        assert distance(gradient, total) <= 1e-9


def test_an_unknown_aggregate_is_refused(partition: GraphPartition) -> None:
    with pytest.raises(ConfigurationError, match="aggregate = 'median': must be one of sum, mean, max"):
        MessagePassing(partition, Message(), "median")  # type: ignore[arg-type]
