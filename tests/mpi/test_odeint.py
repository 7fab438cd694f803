"""A solve that is spread over ranks is the solve of the whole, gradient included, at any number of ranks."""

import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import BatchPartition, GridPartition, Mesh, NeuralODE, odeint
from pnode_dist.distributed.gradients import parallel
from pnode_dist.exchange import global_sum
from pnode_dist.nn import Conv2d
from pnode_dist.ode.methods import resolve
from tests.oracles.fields import convolved
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES, STEP_SIZE = [0.0, 0.3, 0.7], 0.1
SHAPE = (7, 9)


class Flow(nn.Module):
    """du/dt = conv(tanh(conv(u))) + t, on a partitioned grid or on a whole one."""

    def __init__(self, partition: GridPartition, dilation: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.boundary = partition.boundary
        self.first = Conv2d(partition, 2, 3, dilation=dilation, dtype=dtype)
        self.second = Conv2d(partition, 3, 2, dtype=dtype)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(u))) + t
        return result

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        batch = u.reshape(-1, *u.shape[-3:])
        for conv in (self.first, self.second):
            batch = convolved(batch, self.boundary, conv.weight, conv.bias, conv.dilation)
            batch = torch.tanh(batch) if conv is self.first else batch
        return batch.reshape(u.shape) + t


def here(whole: torch.Tensor, partition: GridPartition | BatchPartition) -> torch.Tensor:
    """This rank's part of a global tensor."""
    if isinstance(partition, GridPartition):
        (y0, y1), (x0, x1) = partition.owned
        return whole.detach()[..., y0:y1, x0:x1, :]
    return whole.detach()[:, slice(*partition.owned)]


@pytest.mark.parametrize(
    ("boundary", "method", "times"),
    [
        (("replicate", "periodic"), "rk4", TIMES),
        (("replicate", "periodic"), "dopri5", TIMES),
        (("replicate", "periodic"), "8vr", TIMES[::-1]),
        (("zero", "replicate"), "bosh3", TIMES),
        (("periodic", "zero"), "rk4", TIMES[::-1]),
    ],
    ids=["rk4", "dopri5", "8vr backward", "bosh3", "rk4 backward"],
)
def test_a_convolutional_flow_has_the_loss_and_gradient_of_the_whole_field(
    boundary: tuple[str, str], method: str, times: list[float], mesh: Mesh
) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=boundary)
    flow = Flow(partition)
    parameters = list(flow.parameters())
    whole = random(*SHAPE, 2).requires_grad_()
    target = random(3, *SHAPE, 2, seed=5)
    serial = odeint_plain(flow.whole, whole, times, TABLEAUX[resolve(method).petsc_name], STEP_SIZE)
    serial_loss = ((serial - target) ** 2).mean()
    wanted = torch.autograd.grad(serial_loss, [whole, *parameters])

    local = partition.scatter(whole).requires_grad_()
    solution = odeint(flow, local, times, method=method, step_size=STEP_SIZE, partition=partition)
    assert distance(solution, here(serial, partition)) <= 1e-12
    share = ((solution - here(target, partition)) ** 2).sum() / target.numel()
    assert float(mesh.sum(share)) == pytest.approx(float(serial_loss.detach()), rel=1e-12)
    found = torch.autograd.grad(share, [local, *parameters])
    assert distance(found[0], here(wanted[0][None], partition)[0]) <= 1e-12
    for gradient, whole_gradient in zip(found[1:], wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), whole_gradient) <= 1e-12


def test_batch_axes_and_wide_stencils_come_through_the_solve(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (9, 13), channels=2, boundary=("replicate", "periodic"), stencil_width=3)
    flow = Flow(partition, dilation=3)
    whole = random(2, 9, 13, 2).requires_grad_()
    serial = odeint_plain(flow.whole, whole, TIMES, TABLEAUX["2b"], STEP_SIZE)
    wanted = torch.autograd.grad(torch.sin(serial).sum(), [whole, *flow.parameters()])
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(flow, local, TIMES, method="midpoint", step_size=STEP_SIZE, partition=partition)
    found = torch.autograd.grad(torch.sin(solution).sum(), [local, *flow.parameters()])
    assert distance(found[0], here(wanted[0], partition)) <= 1e-12
    assert distance([mesh.sum(g) for g in found[1:]], wanted[1:]) <= 1e-12


def test_float32_convolutions_are_solved_in_float32(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("replicate", "periodic"))
    flow = Flow(partition, dtype=torch.float32)
    whole = random(*SHAPE, 2, dtype=torch.float32)
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(flow, local, TIMES, partition=partition)
    assert solution.dtype == torch.float32
    (found,) = torch.autograd.grad(torch.sin(solution).sum(), [local])
    exact = Flow(partition, dtype=torch.float64)
    exact.load_state_dict(flow.state_dict())
    start = whole.double().requires_grad_()
    serial = odeint_plain(exact.whole, start, TIMES, TABLEAUX["4"])
    (wanted,) = torch.autograd.grad(torch.sin(serial).sum(), [start])
    assert distance(solution.double(), here(serial, partition)) <= 1e-5
    assert distance(found.double(), here(wanted[None], partition)[0]) <= 1e-5


@pytest.mark.parametrize("samples", [7, 1], ids=["uneven", "some ranks own nothing"])
@pytest.mark.parametrize("method", ["rk4", "bosh3", "7vr"])
def test_a_batch_under_ddp_has_the_loss_and_gradient_of_the_whole_batch(method: str, samples: int, mesh: Mesh) -> None:
    partition = BatchPartition(mesh, samples, (3,))
    network = Network()
    node = NeuralODE(network, method=method, step_size=STEP_SIZE, partition=partition)
    model = parallel(node, mesh)
    whole, target = random(samples, 3).requires_grad_(), random(3, samples, 3, seed=6)
    serial = odeint_plain(network, whole, TIMES, TABLEAUX[resolve(method).petsc_name], STEP_SIZE)
    serial_loss = ((serial - target) ** 2).mean()
    wanted = torch.autograd.grad(serial_loss, [whole, *network.parameters()])

    local = partition.scatter(whole).requires_grad_()
    share = ((model(local, TIMES) - here(target, partition)) ** 2).sum() / target.numel()
    assert float(mesh.sum(share)) == pytest.approx(float(serial_loss.detach()), rel=1e-12)
    share.backward()  # type: ignore[no-untyped-call]
    assert distance(local.grad, wanted[0][slice(*partition.owned)]) <= 1e-12
    assert distance([p.grad for p in network.parameters()], wanted[1:]) <= 1e-12


@pytest.mark.parametrize("samples", [7, 1], ids=["uneven", "some ranks own nothing"])
def test_samples_coupled_by_their_mean_have_the_gradient_of_the_whole(samples: int, mesh: Mesh, comm: MPI.Comm) -> None:
    partition = BatchPartition(mesh, samples, (3,))
    matrix = (0.3 * random(3, 3)).requires_grad_()

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.sum(0), comm) / samples
        return torch.tanh(u @ matrix) - t * u * mean

    def whole_field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ matrix) - t * u * u.mean(0)

    whole = random(samples, 3).requires_grad_()
    serial = odeint_plain(whole_field, whole, TIMES, TABLEAUX["4"], STEP_SIZE)
    wanted = torch.autograd.grad(torch.sin(serial).sum(), [whole, matrix])
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(field, local, TIMES, step_size=STEP_SIZE, partition=partition)
    assert distance(solution, here(serial, partition)) <= 1e-12
    found = torch.autograd.grad(torch.sin(solution).sum(), [local, matrix])
    assert distance(found[0], wanted[0][slice(*partition.owned)]) <= 1e-12
    assert distance(mesh.sum(found[1]), wanted[1]) <= 1e-12


def test_a_tuple_of_local_parts_is_solved(mesh: Mesh, comm: MPI.Comm) -> None:
    partition = GridPartition(mesh, SHAPE, channels=1, boundary=("replicate", "periodic"))
    torch.manual_seed(2)
    conv = Conv2d(partition, 1, 1, dtype=torch.float64)
    field, total = random(*SHAPE, 1).requires_grad_(), random(1, seed=3).requires_grad_()

    def func(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        # The second part is the same number on every rank, this rank's copy of it.
        return torch.tanh(conv(u[0])) * u[1], global_sum(u[0].sum(), comm) / 63 - u[1]

    def whole(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        around = convolved(u[0][None], partition.boundary, conv.weight, conv.bias)[0]
        return torch.tanh(around) * u[1], u[0].mean() - u[1]

    serial = odeint_plain(whole, (field, total), TIMES, TABLEAUX["4"], STEP_SIZE)
    loss = torch.sin(serial[0]).sum() + (serial[1] ** 2).sum()
    wanted = torch.autograd.grad(loss, [field, total, *conv.parameters()])
    start = (partition.scatter(field).requires_grad_(), total.detach().clone().requires_grad_())
    found = odeint(func, start, TIMES, step_size=STEP_SIZE, partition=partition)
    assert distance(found[0], here(serial[0], partition)) <= 1e-12
    assert distance(found[1], serial[1]) <= 1e-12
    share = torch.sin(found[0]).sum() + (found[1] ** 2).sum() / mesh.size
    gradients = torch.autograd.grad(share, [*start, *conv.parameters()])
    assert distance(gradients[0], here(wanted[0][None], partition)[0]) <= 1e-12
    assert distance([mesh.sum(g) for g in gradients[1:]], wanted[1:]) <= 1e-12


def test_without_a_partition_every_rank_solves_for_itself(comm: MPI.Comm) -> None:
    network, u0 = Network(), random(2 + comm.rank, 3, seed=comm.rank).requires_grad_()
    times = [0.0, 0.1 * (1 + comm.rank)]
    solution = odeint(network, u0, times, step_size=0.05)
    serial = odeint_plain(network, u0, times, TABLEAUX["4"], 0.05)
    found = torch.autograd.grad(solution.sum(), [u0, *network.parameters()])
    assert distance(found, torch.autograd.grad(serial.sum(), [u0, *network.parameters()])) <= 1e-12


def test_a_communicator_may_stand_in_for_a_mesh(comm: MPI.Comm) -> None:
    partition = BatchPartition(comm, 5, (3,))
    network, whole = Network(), random(5, 3)
    found = odeint(network, partition.scatter(whole), TIMES, partition=partition)
    assert distance(found, here(odeint_plain(network, whole, TIMES, TABLEAUX["4"]), partition)) <= 1e-12


def test_ranks_that_disagree_on_the_number_of_steps_are_told_so_on_all(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    u0 = partition.scatter(random(2 * mesh.size, 3))
    step_size = 0.1 if mesh.rank == mesh.size - 1 else 0.05
    if mesh.size == 1:
        assert odeint(Network(), u0, TIMES, step_size=step_size, partition=partition).shape == (3, 2, 3)
        return
    with pytest.raises(RuntimeError, match="differ in step_size"):
        odeint(Network(), u0, TIMES, step_size=step_size, partition=partition)


def test_ranks_that_disagree_on_needing_a_gradient_are_told_so_on_all(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 2 * mesh.size, (3,))
    u0 = partition.scatter(random(2 * mesh.size, 3)).requires_grad_(mesh.rank == 0)
    if mesh.size == 1:
        assert odeint(lambda t, u: -u, u0, TIMES, partition=partition).requires_grad
        return
    with pytest.raises(RuntimeError, match="only some ranks need a gradient"):
        odeint(lambda t, u: -u, u0, TIMES, partition=partition)


def test_a_field_computed_in_float32_has_the_float64_gradient_up_to_rounding(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, channels=2, boundary=("periodic", "zero"))
    flow = Flow(partition)
    parameters = list(flow.parameters())
    whole = random(*SHAPE, 2).requires_grad_()
    states = odeint_plain(flow.whole, whole, TIMES, TABLEAUX["4"], STEP_SIZE)
    wanted = torch.autograd.grad(states[-1].square().sum(), [whole, *parameters])

    local = here(whole, partition).clone().requires_grad_()
    node = NeuralODE(flow, step_size=STEP_SIZE, partition=partition, compute_dtype=torch.float32)
    found = torch.autograd.grad(node(local, TIMES)[-1].square().sum(), [local, *parameters])
    assert 0 < distance(found[0], here(wanted[0], partition)) <= 1e-6
    assert all(distance(mesh.sum(f), w) <= 1e-6 for f, w in zip(found[1:], wanted[1:], strict=True))
