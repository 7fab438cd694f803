"""Exchanges under forward mode, torch.func and nested derivatives: every one is the derivative of the whole field."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from mpi4py import MPI
from torch.autograd import forward_ad

from pnode_dist import BatchPartition, GridPartition, Mesh
from pnode_dist.exchange import gather, global_sum, halo, scatter
from pnode_dist.nn import Conv2d
from tests.mpi.grids import block
from tests.mpi.test_exchange import inner, positive
from tests.oracles.differences import directional_derivative
from tests.oracles.fields import convolved, padded
from tests.oracles.right_hand_sides import distance, random

pytestmark = pytest.mark.mpi

RULES = ("periodic", "replicate", "zero")
SHAPE = (7, 9)
Function = Callable[[torch.Tensor], torch.Tensor]
Pushforward = Callable[[Function, torch.Tensor, torch.Tensor], torch.Tensor]


def by_dual_numbers(function: Function, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """J v by torch.autograd.forward_ad."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent
        assert tangent is not None
        return tangent.clone()


def by_torch_func(function: Function, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """J v by torch.func.jvp."""
    tangent: torch.Tensor = torch.func.jvp(function, (x,), (v,))[1]
    return tangent


@pytest.fixture(params=[by_dual_numbers, by_torch_func])
def jvp(request: pytest.FixtureRequest) -> Pushforward:
    """The ways to push a tangent forward."""
    way: Pushforward = request.param
    return way


def pulled_back(function: Function, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """J^T w by torch.func.vjp."""
    cotangent: torch.Tensor = torch.func.vjp(function, x)[1](w)[0]
    return cotangent


@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_the_tangent_of_a_halo_is_the_padding_of_the_tangent(
    boundary: tuple[str, str], jvp: Pushforward, mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=3)
    x, v = random(2, *SHAPE, 2), random(2, *SHAPE, 2, seed=2)
    for width in ((1, 1), (3, 3), (1, 2), (0, 2)):
        found = jvp(lambda u, w=width: halo(u, partition, w), block(partition, x), block(partition, v))
        assert torch.equal(found, block(partition, padded(v, boundary, width), width)), width


@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_the_tangent_of_a_halo_is_the_product_with_the_matrix_of_padding(
    boundary: tuple[str, str], jvp: Pushforward, mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPE, boundary=boundary)
    points = SHAPE[0] * SHAPE[1]
    # Column by column: the padding of the fields that are 1 at one point.
    columns = padded(torch.eye(points, dtype=torch.float64).view(points, *SHAPE, 1), boundary, (1, 1))
    matrix = columns.reshape(points, -1).T
    v = random(*SHAPE, 1, seed=2)
    wanted = (matrix @ v.view(-1)).view(SHAPE[0] + 2, SHAPE[1] + 2, 1)
    found = jvp(lambda u: halo(u, partition), block(partition, random(*SHAPE, 1)), block(partition, v))
    assert torch.equal(found, block(partition, wanted, (1, 1)))


@pytest.mark.parametrize("boundary", list(product(RULES, RULES)))
def test_the_halo_and_its_adjoint_are_transposes_in_both_modes(
    boundary: tuple[str, str], jvp: Pushforward, mesh: Mesh, comm: MPI.Comm
) -> None:
    partition = GridPartition(mesh, SHAPE, boundary=boundary, stencil_width=2)

    def forward(u: torch.Tensor) -> torch.Tensor:
        return halo(u, partition)

    def adjoint(w: torch.Tensor) -> torch.Tensor:
        return pulled_back(forward, torch.zeros(2, *partition.local_shape[:2], 2, dtype=torch.float64), w)

    inside = positive(2, *partition.local_shape[:2], 2, seed=comm.rank)
    around = positive(2, partition.local_shape[0] + 4, partition.local_shape[1] + 4, 2, seed=50 + comm.rank)
    # <w, H v> = <H^T w, v>, and the same of H^T as a function in its own right.
    for function, v, w in ((forward, inside, around), (adjoint, around, inside)):
        image, back = jvp(function, v, v), pulled_back(function, v, w)
        assert inner(comm, (w, image)) == pytest.approx(inner(comm, (back, v)), rel=1e-13)
    assert torch.equal(jvp(adjoint, inside.new_zeros(around.shape), around), adjoint(around))


def test_a_global_sum_sums_the_tangents(jvp: Pushforward, comm: MPI.Comm) -> None:
    tangents = [positive(4, seed=rank) for rank in range(comm.size)]
    found = jvp(lambda x: global_sum(x, comm), random(4, seed=comm.rank), tangents[comm.rank])
    torch.testing.assert_close(found, torch.stack(tangents).sum(0), rtol=1e-14, atol=0)
    w = positive(4, seed=50 + comm.rank)
    back = pulled_back(lambda x: global_sum(x, comm), random(4, seed=comm.rank), w)
    assert inner(comm, (w, found)) == pytest.approx(inner(comm, (back, tangents[comm.rank])), rel=1e-13)


@pytest.fixture(params=["grid", "batch", "batch smaller than the ranks"])
def partition(request: pytest.FixtureRequest, mesh: Mesh) -> GridPartition | BatchPartition:
    """Partitions of each kind."""
    if request.param == "grid":
        return GridPartition(mesh, SHAPE, channels=2)
    return BatchPartition(mesh, 7 if request.param == "batch" else 1, (3,))


def at_root(x: torch.Tensor, comm: MPI.Comm, root: int) -> torch.Tensor:
    """`x` on `root`, an empty tensor elsewhere."""
    return x if comm.rank == root else x.new_empty(0)


def test_scatter_scatters_the_tangent_and_gathers_the_cotangent(
    jvp: Pushforward, partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    root = comm.size - 1
    whole, v = random(2, *partition.global_shape), random(2, *partition.global_shape, seed=2)
    x, tangent = at_root(whole, comm, root), at_root(v, comm, root)
    found = jvp(lambda x: scatter(x, partition, root), x, tangent)
    assert torch.equal(found, partition.scatter(v))
    w = random(2, *partition.global_shape, seed=3)
    back = pulled_back(lambda x: scatter(x, partition, root), x, partition.scatter(w))
    assert torch.equal(back, at_root(w, comm, root))


def test_gather_gathers_the_tangent_and_scatters_the_cotangent(
    jvp: Pushforward, partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    root = comm.size - 1
    whole, v = random(2, *partition.global_shape), random(2, *partition.global_shape, seed=2)
    x = partition.scatter(whole)
    found = jvp(lambda x: gather(x, partition, root), x, partition.scatter(v))
    assert torch.equal(found, at_root(v, comm, root))
    w = random(2, *partition.global_shape, seed=3)
    back = pulled_back(lambda x: gather(x, partition, root), x, at_root(w, comm, root))
    assert torch.equal(back, partition.scatter(w))


def test_scattering_a_dual_number_needs_one_on_root_alone(
    partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    whole, v = random(*partition.global_shape), random(*partition.global_shape, seed=2)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(whole, v) if comm.rank == 0 else None
        image = forward_ad.unpack_dual(scatter(x, partition))
        assert image.tangent is not None
        assert torch.equal(image.tangent, partition.scatter(v))


def test_scattering_with_no_tensor_at_the_root_is_refused_on_all_ranks(
    partition: GridPartition | BatchPartition, comm: MPI.Comm
) -> None:
    with pytest.raises(ValueError, match="scatter: rank 0, the root, gave no tensor"):
        scatter(None if comm.rank == 0 else torch.zeros(1), partition)


def test_scatter_and_gather_have_second_derivatives(partition: GridPartition | BatchPartition, comm: MPI.Comm) -> None:
    whole, v = random(*partition.global_shape), random(*partition.global_shape, seed=2)
    # d2/dx2 of sum(x^4 / 12) along v is x^2 v, here with the fourth power taken of the pieces, and of the whole.
    through_pieces = at_root(whole, comm, 0).requires_grad_()
    share = (scatter(through_pieces, partition) ** 4 / 12).sum()
    (gradient,) = torch.autograd.grad(share, through_pieces, create_graph=True)
    (found,) = torch.autograd.grad((gradient * at_root(v, comm, 0)).sum(), through_pieces)
    assert distance(found, at_root(whole**2 * v, comm, 0)) <= 1e-14

    pieces = partition.scatter(whole).requires_grad_()
    share = (gather(pieces, partition) ** 4 / 12).sum()
    (gradient,) = torch.autograd.grad(share, pieces, create_graph=True)
    (found,) = torch.autograd.grad((gradient * partition.scatter(v)).sum(), pieces)
    assert distance(found, partition.scatter(whole**2 * v)) <= 1e-14


class Coupled:
    """A nonlinear function of a field, two convolutions and a global mean: split over ranks, and in one piece."""

    def __init__(self, mesh: Mesh, boundary: tuple[str, str]) -> None:
        self.partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary, stencil_width=2)
        torch.manual_seed(3)
        self.inner = Conv2d(self.partition, 2, 3, kernel_size=(3, 5), dtype=torch.float64)
        self.outer = Conv2d(self.partition, 3, 2, dilation=2, dtype=torch.float64)

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.square().sum(), self.partition.comm) / (SHAPE[0] * SHAPE[1])
        image: torch.Tensor = self.outer(torch.tanh(self.inner(u))) / (1 + mean)
        return image

    def whole(self, u: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The same by torch's own convolutions; `weight` in place of the inner layer's."""
        weight = self.inner.weight if weight is None else weight
        batched, rules = u.view(-1, *SHAPE, 2), self.partition.boundary
        hidden = torch.tanh(convolved(batched, rules, weight, self.inner.bias))
        image = convolved(hidden, rules, self.outer.weight, self.outer.bias, (2, 2))
        return image.view(u.shape) / (1 + u.square().sum() / (SHAPE[0] * SHAPE[1]))

    def matrix(self, u: torch.Tensor) -> torch.Tensor:
        """The dense Jacobian of the whole, by rows in reverse mode."""
        jacobian = torch.autograd.functional.jacobian(self.whole, u)
        assert isinstance(jacobian, torch.Tensor)
        return jacobian.detach().reshape(u.numel(), u.numel())


@pytest.fixture(params=[("periodic", "replicate"), ("zero", "periodic"), ("replicate", "zero")], ids="-".join)
def coupled(request: pytest.FixtureRequest, mesh: Mesh) -> Coupled:
    """The function with several boundary rules."""
    return Coupled(mesh, request.param)


def test_the_tangent_of_a_network_is_the_product_with_its_dense_jacobian(coupled: Coupled, jvp: Pushforward) -> None:
    u, v, scatter = random(*SHAPE, 2), random(*SHAPE, 2, seed=2), coupled.partition.scatter
    found = jvp(coupled, scatter(u), scatter(v))
    assert distance(found, scatter((coupled.matrix(u) @ v.view(-1)).view(u.shape))) <= 1e-13


def test_the_tangent_of_a_network_is_its_central_difference(coupled: Coupled, jvp: Pushforward, comm: MPI.Comm) -> None:
    scatter = coupled.partition.scatter
    u, v = scatter(random(*SHAPE, 2)), scatter(random(*SHAPE, 2, seed=2))
    w = scatter(random(*SHAPE, 2, seed=4))
    found = inner(comm, (w, jvp(coupled, u, v).detach()))
    wanted = directional_derivative(lambda x: inner(comm, (w, coupled(x).detach())), [u], [v])
    assert found == pytest.approx(wanted, rel=1e-9)


def test_a_network_s_two_modes_are_transposes(coupled: Coupled, jvp: Pushforward, comm: MPI.Comm) -> None:
    scatter = coupled.partition.scatter
    u, v, w = (scatter(random(3, *SHAPE, 2, seed=seed)) for seed in (1, 2, 3))
    forward, back = inner(comm, (w, jvp(coupled, u, v).detach())), inner(comm, (pulled_back(coupled, u, w).detach(), v))
    assert forward == pytest.approx(back, rel=1e-11)


def test_a_tangent_of_the_weights_is_carried_through_the_exchanges(coupled: Coupled, jvp: Pushforward) -> None:
    u, scatter = random(*SHAPE, 2), coupled.partition.scatter
    weight = coupled.inner.weight.detach()
    direction = random(*weight.shape, seed=5)
    # The field of the inner layer carries a tangent, the state does not.
    wanted = torch.autograd.functional.jvp(lambda x: coupled.whole(u, x), weight, direction)[1]
    local = scatter(u)
    found = jvp(lambda x: with_inner_weight(coupled, local, x), weight, direction)
    assert distance(found, scatter(wanted)) <= 1e-13


def with_inner_weight(coupled: Coupled, u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The split function with another weight in its inner layer."""
    mean = global_sum(u.square().sum(), coupled.partition.comm) / (SHAPE[0] * SHAPE[1])
    parameters = {"weight": weight, "bias": coupled.inner.bias}
    hidden = torch.func.functional_call(coupled.inner, parameters, (u,))
    image: torch.Tensor = coupled.outer(torch.tanh(hidden)) / (1 + mean)
    return image


def test_a_curvature_is_that_of_the_whole_in_any_nesting_of_the_modes(coupled: Coupled, jvp: Pushforward) -> None:
    u, v, w = (random(*SHAPE, 2, seed=seed) for seed in (1, 2, 3))
    scatter = coupled.partition.scatter
    wanted = torch.autograd.functional.hvp(lambda x: (w * coupled.whole(x)).sum(), u, v)[1]
    local, direction, weight = scatter(u), scatter(v), scatter(w)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return pulled_back(coupled, x, weight)

    leaf = local.clone().requires_grad_()
    (first,) = torch.autograd.grad(coupled(leaf), leaf, weight, create_graph=True)
    nestings = {
        "reverse over reverse": torch.autograd.grad(first, leaf, direction)[0],
        "reverse over reverse by torch.func": pulled_back(gradient, local, direction),
        "forward over reverse": jvp(gradient, local, direction),
        "reverse over forward": pulled_back(lambda x: jvp(coupled, x, direction), local, weight),
    }
    for nesting, found in nestings.items():
        assert distance(found, scatter(wanted)) <= 1e-12, nesting


def test_forward_mode_over_a_graph_of_plain_reverse_mode(coupled: Coupled) -> None:
    u, v, w = (random(*SHAPE, 2, seed=seed) for seed in (1, 2, 3))
    scatter = coupled.partition.scatter
    wanted = torch.autograd.functional.hvp(lambda x: (w * coupled.whole(x)).sum(), u, v)[1]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(scatter(u).requires_grad_(), scatter(v))
        (gradient,) = torch.autograd.grad(coupled(x), x, scatter(w))
        found = forward_ad.unpack_dual(gradient).tangent
    assert found is not None
    assert distance(found, scatter(wanted)) <= 1e-12


def test_many_tangents_at_once_are_exchanged_together(comm: MPI.Comm, mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, boundary=("periodic", "replicate"))
    v = random(5, *SHAPE, 1, seed=2)
    local = block(partition, v).movedim(0, 2)

    def scaled(u: torch.Tensor) -> torch.Tensor:
        return halo(u, partition) * global_sum(u.new_ones(()) + 0 * u.sum(), comm)

    found = torch.func.vmap(scaled, in_dims=2)(local)
    assert torch.equal(found, comm.size * block(partition, padded(v, partition.boundary, (1, 1)), (1, 1)))
