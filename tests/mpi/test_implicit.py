"""An implicit solve that is spread over ranks is the dense solve of the whole, gradient included, at any number."""

from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

from pnode_dist import BatchPartition, GridPartition, Mesh, NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.exchange import global_sum
from pnode_dist.nn import Conv2d
from pnode_dist.ode.methods import METHODS
from tests.oracles.arkimex_tableaux import ARKIMEX
from tests.oracles.collocation import COLLOCATION, Collocation
from tests.oracles.dirk_tableaux import DIRK, OWN_DIRK
from tests.oracles.fields import convolved
from tests.oracles.implicit import BACKWARD_EULER, CRANK_NICOLSON, MIDPOINT, Theta, diagonal_mass, odeint_implicit
from tests.oracles.implicit_tableaux import ImplicitTableau
from tests.oracles.right_hand_sides import distance, identical, random
from tests.tiers import at_night

pytestmark = pytest.mark.mpi

TIMES, STEP_SIZE = [0.0, 0.1, 0.2], 0.1
SHAPE, CHANNELS, BOUNDARY = (4, 3), 2, ("replicate", "periodic")
# Newton's method to rounding with linear solves that are not; those of the adjoint follow the tolerance of Newton's.
TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-13, "snes_stol": 1e-14, "ksp_rtol": 1e-6, "ksp_atol": 1e-50}

ORACLES: dict[str, Theta | ImplicitTableau | Collocation] = {
    "beuler": BACKWARD_EULER,
    "cn": CRANK_NICOLSON,
    "theta": MIDPOINT,
    **{f"arkimex_{name}": table for name, table in ARKIMEX.items()},
    **{f"dirk_{name}": table for name, table in DIRK.items()},
    **OWN_DIRK,
    **COLLOCATION,
}


class Smoothing(nn.Module):
    """du/dt = conv(u) - 8 (u + u^3 / 3) + cos(t): stiff, each cell coupled with its neighbours."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.boundary = partition.boundary
        self.conv = Conv2d(partition, CHANNELS, CHANNELS, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.add(self._rest(t, u), self.conv(u))

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self._rest(t, u) + convolved(u[None], self.boundary, self.conv.weight, self.conv.bias)[0]

    def _rest(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.cos(t) - 8 * (u + u**3 / 3)


class Reaction(nn.Module):
    """du/dt = tanh(conv(u)) t + u, not stiff."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.boundary = partition.boundary
        self.conv = Conv2d(partition, CHANNELS, CHANNELS, dtype=torch.float64)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(u)) * (1 + t) + u

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(convolved(u[None], self.boundary, self.conv.weight, self.conv.bias)[0]) * (1 + t) + u


class Flow(nn.Module):
    """The sum of the two."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        self.smoothing, self.reaction = Smoothing(partition), Reaction(partition)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.smoothing(t, u) + self.reaction(t, u)
        return result

    def whole(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.smoothing.whole(t, u) + self.reaction.whole(t, u)

    @property
    def split(self) -> SplitFunction:
        """The smoothing implicit, the reaction explicit."""
        return SplitFunction(implicit=self.smoothing, explicit=self.reaction)


@pytest.fixture(scope="module")
def partition(mesh: Mesh) -> GridPartition:
    """A field small enough for dense Jacobians."""
    return GridPartition(mesh, SHAPE, channels=CHANNELS, boundary=BOUNDARY)


def here(whole: torch.Tensor, partition: GridPartition) -> torch.Tensor:
    """This rank's part of a global tensor."""
    (y0, y1), (x0, x1) = partition.owned
    return whole.detach()[..., y0:y1, x0:x1, :]


def assert_that_of_the_whole(
    solution: torch.Tensor,
    local: torch.Tensor,
    serial: torch.Tensor,
    whole: torch.Tensor,
    parameters: list[nn.Parameter],
    partition: GridPartition,
    mesh: Mesh,
) -> None:
    """The local solution and its gradients are this rank's share of the global ones, to 1e-10 of the largest entry."""
    assert float((solution - here(serial, partition)).detach().abs().max()) <= 1e-10 * float(
        serial.detach().abs().max()
    )
    wanted = torch.autograd.grad(torch.sin(serial).sum(), [whole, *parameters])
    found = torch.autograd.grad(torch.sin(solution).sum(), [local, *parameters])
    share = found[0] - here(wanted[0], partition)
    assert float(share.abs().max()) <= 1e-10 * float(wanted[0].abs().max())
    for gradient, whole_gradient in zip(found[1:], wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), whole_gradient) <= 1e-10


def test_every_implicit_method_with_an_adjoint_has_an_oracle() -> None:
    verified = {name for name, method in METHODS.items() if method.implicit and method.adjoint == "verified"}
    assert verified == set(ORACLES)


# However many stages: PETSc combines vectors, each rank its part. So more than two ranks need not see every table.
OF_EACH_KIND = ["beuler", "cn", "theta", "arkimex_ars443", "dirk_es324sal", "gauss6", "radau5"]


@pytest.mark.parametrize("method", at_night(ORACLES, OF_EACH_KIND) if MPI.COMM_WORLD.size <= 2 else OF_EACH_KIND)
def test_a_field_has_the_solution_and_gradient_of_the_dense_solve_of_the_whole(
    method: str, partition: GridPartition, mesh: Mesh
) -> None:
    flow, oracle = Flow(partition), ORACLES[method]
    parameters, whole = list(flow.parameters()), random(*SHAPE, CHANNELS).requires_grad_()
    # One step of a method of many stages says enough.
    times = TIMES[:2] if METHODS[method].stages > 6 else TIMES
    if isinstance(oracle, ImplicitTableau) and oracle.additive:
        serial = odeint_implicit(flow.smoothing.whole, whole, times, oracle, STEP_SIZE, explicit=flow.reaction.whole)
    else:
        serial = odeint_implicit(flow.whole, whole, times, oracle, STEP_SIZE)
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(flow.split, local, times, method=method, step_size=STEP_SIZE, partition=partition, options=TIGHT)
    assert_that_of_the_whole(solution, local, serial, whole, parameters, partition, mesh)


@pytest.mark.parametrize("zeros", [False, True], ids=["regular", "singular"])
@pytest.mark.parametrize("method", ["beuler", "cn", "theta", "gauss4", "radau5"])
def test_a_diagonal_mass_is_that_of_the_whole(method: str, zeros: bool, partition: GridPartition, mesh: Mesh) -> None:
    """With zeros the second channel is algebraic: what the stiff part makes of the first."""
    flow = Flow(partition)
    parameters, whole = list(flow.parameters()), random(*SHAPE, CHANNELS).requires_grad_()
    mass = 1 + 0.5 * torch.rand(*SHAPE, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if zeros:
        mass[..., 1] = 0
    serial = odeint_implicit(flow.whole, whole, TIMES, ORACLES[method], STEP_SIZE, mass=diagonal_mass(mass))
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(
        flow,
        local,
        TIMES,
        method=method,
        step_size=STEP_SIZE,
        partition=partition,
        options=TIGHT,
        mass=partition.scatter(mass),
    )
    assert_that_of_the_whole(solution, local, serial, whole, parameters, partition, mesh)


@pytest.fixture
def scratch(tmp_path: Path, comm: MPI.Comm) -> Path:
    """One directory for all ranks."""
    path: Path = comm.bcast(tmp_path)
    return path


@pytest.mark.parametrize("method", ["arkimex_l2", "dirk_es213sal", "radau3"])
def test_the_gradient_of_a_field_has_the_same_bits_under_every_budget(
    method: str, partition: GridPartition, scratch: Path
) -> None:
    flow = Flow(partition)
    node = NeuralODE(flow.split, method=method, step_size=0.07, partition=partition, options=TIGHT)
    u0 = partition.scatter(random(*SHAPE, CHANNELS))

    def gradient(trajectory: Trajectory) -> tuple[torch.Tensor, ...]:
        node.trajectory = trajectory
        start = u0.detach().clone().requires_grad_()
        solution = node(start, [0.0, 0.07, 0.21])
        return (solution.detach(), *torch.autograd.grad(torch.sin(solution).sum(), [start, *flow.parameters()]))

    wanted = gradient(Trajectory(keep="solution"))
    for trajectory in (
        Trajectory(keep="stages"),
        Trajectory(keep="graph"),
        Trajectory(ram_slots=1, disk_slots=1, directory=scratch),
    ):
        assert identical(gradient(trajectory), wanted), trajectory


@pytest.mark.parametrize("samples", [4, 1], ids=["uneven", "some ranks own nothing"])
@pytest.mark.parametrize("method", ["beuler", "arkimex_3", "dirk_s212", "radau3"])
def test_samples_coupled_by_their_mean_are_solved_together(
    method: str, samples: int, mesh: Mesh, comm: MPI.Comm
) -> None:
    partition = BatchPartition(mesh, samples, (3,))
    matrix = (0.3 * random(3, 3)).requires_grad_()
    rates = torch.tensor([1.0, 6.0, 30.0], dtype=torch.float64)

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        mean = global_sum(u.sum(0), comm) / samples
        return torch.tanh(u @ matrix) - rates * (u + t * mean)

    def whole_field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ matrix) - rates * (u + t * u.mean(0))

    whole = random(samples, 3).requires_grad_()
    serial = odeint_implicit(whole_field, whole, TIMES, ORACLES[method], STEP_SIZE)
    wanted = torch.autograd.grad(torch.sin(serial).sum(), [whole, matrix])
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(field, local, TIMES, method=method, step_size=STEP_SIZE, partition=partition, options=TIGHT)
    owned = slice(*partition.owned)
    found = torch.autograd.grad(torch.sin(solution).sum(), [local, matrix])
    assert distance(mesh.sum(found[1]), wanted[1]) <= 1e-10
    if local.numel():
        assert distance(solution, serial[:, owned]) <= 1e-10
        assert distance(found[0], wanted[0][owned]) <= 1e-10


def test_a_distributed_matrix_of_petsc_is_the_implicit_part(
    partition: GridPartition, mesh: Mesh, comm: MPI.Comm
) -> None:
    """Row and column i of the Mat belong to the i-th entry of the ranks' states laid end to end."""
    reaction = Reaction(partition)
    whole, numbers = random(*SHAPE, CHANNELS).requires_grad_(), torch.arange(24).reshape(*SHAPE, CHANNELS)
    order = torch.cat(comm.allgather(here(numbers, partition).reshape(-1)))
    dense = random(24, 24, seed=3) - 10 * torch.eye(24, dtype=torch.float64)
    permuted = dense[order][:, order]
    size = partition.scatter(whole).numel()
    matrix = PETSc.Mat().createAIJ(((size, 24), (size, 24)), comm=comm)
    matrix.setUp()
    for row in range(*matrix.getOwnershipRange()):
        matrix.setValues([row], list(range(24)), permuted[row].numpy())
    matrix.assemble()

    def linear(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (dense @ u.reshape(-1)).reshape(u.shape)

    serial = odeint_implicit(linear, whole, TIMES, ARKIMEX["3"], STEP_SIZE, explicit=reaction.whole)
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(
        SplitFunction(implicit=matrix, explicit=reaction),
        local,
        TIMES,
        method="arkimex_3",
        step_size=STEP_SIZE,
        partition=partition,
        options=TIGHT,
    )
    assert_that_of_the_whole(solution, local, serial, whole, list(reaction.parameters()), partition, mesh)
