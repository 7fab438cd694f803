"""Batches of small systems that are spread over ranks: every rank solves its samples, and all go on together."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI

from pnode_dist import BatchPartition, ConvergenceError, Mesh, NeuralODE, odeint
from pnode_dist.exchange import global_sum
from pnode_dist.ode.steppers.batched import BatchedStepper
from tests.mpi.test_implicit import ORACLES
from tests.oracles.implicit import odeint_implicit
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.stiff_right_hand_sides import StiffNetwork
from tests.tiers import at_night

pytestmark = pytest.mark.mpi

TIMES, STEP_SIZE = [0.0, 0.1, 0.2], 0.1
# Newton's method to rounding.
TIGHT = {"snes_rtol": 1e-14, "snes_atol": 1e-15, "snes_stol": 1e-15}


@pytest.mark.parametrize("samples", [5, 1], ids=["uneven", "some ranks own nothing"])
@pytest.mark.parametrize(
    "method", at_night(["beuler", "cn", "theta", "arkimex_3", "dirk_es324sal", "radau5"], ["beuler", "radau5"])
)
def test_a_batch_has_the_values_and_gradients_of_the_dense_solve(method: str, samples: int, mesh: Mesh) -> None:
    partition = BatchPartition(mesh, samples, (3,))
    network, whole = StiffNetwork(), random(samples, 3).requires_grad_()
    parameters = list(network.parameters())
    serial = odeint_implicit(network, whole, TIMES, ORACLES[method], STEP_SIZE)
    wanted = torch.autograd.grad(torch.sin(serial).sum(), [whole, *parameters])
    local = partition.scatter(whole).requires_grad_()
    node = NeuralODE(network, method=method, step_size=STEP_SIZE, partition=partition, options=TIGHT)
    solution = node(local, TIMES)
    found = torch.autograd.grad(torch.sin(solution).sum(), [local, *parameters])
    (solver,) = node._solvers._solvers.values()
    assert isinstance(solver.stepper, BatchedStepper)
    assert node.last_solve.linear_iterations == 0
    for gradient, other in zip(found[1:], wanted[1:], strict=True):
        assert distance(mesh.sum(gradient), other) <= 1e-12
    if local.numel():
        owned = slice(*partition.owned)
        assert distance(solution, serial[:, owned]) <= 1e-12
        assert distance(found[0], wanted[0][owned]) <= 1e-12


def test_samples_coupled_between_ranks_are_left_to_petsc_on_all_ranks(mesh: Mesh, comm: MPI.Comm) -> None:
    samples = 5
    partition = BatchPartition(mesh, samples, (3,))
    rates = torch.tensor([1.0, 6.0, 30.0], dtype=torch.float64)

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -rates * (u + global_sum(u.sum(0), comm) / samples)

    def whole_field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -rates * (u + u.mean(0))

    whole = random(samples, 3).requires_grad_()
    serial = odeint_implicit(whole_field, whole, TIMES, ORACLES["beuler"], STEP_SIZE)
    (wanted,) = torch.autograd.grad(torch.sin(serial).sum(), whole)
    local = partition.scatter(whole).requires_grad_()
    solution = odeint(field, local, TIMES, method="beuler", step_size=STEP_SIZE, partition=partition)
    (found,) = torch.autograd.grad(torch.sin(solution).sum(), local)
    owned = slice(*partition.owned)
    assert float((solution - serial[:, owned]).detach().abs().amax()) <= 1e-7
    assert float((found - wanted[owned]).abs().amax()) <= 1e-7


def test_all_ranks_take_as_many_iterations_if_f_communicates(mesh: Mesh, comm: MPI.Comm) -> None:
    samples = 5
    partition = BatchPartition(mesh, samples, (1,))

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        # Without a derivative, so the samples do not depend on one another.
        return -u * torch.exp(u * u) + comm.allreduce(1.0)

    whole = torch.logspace(-3, 0, samples, dtype=torch.float64)[:, None]
    ends = odeint(field, partition.scatter(whole), [0.0, 1.0], method="beuler", step_size=1.0, partition=partition)[-1]
    start = partition.scatter(whole)
    residual = ends - start + ends * torch.exp(ends * ends) - comm.size
    assert not ends.numel() or float(residual.abs().max()) <= 1e-7


def test_a_sample_that_fails_on_one_rank_is_an_error_on_all(mesh: Mesh) -> None:
    samples = 5
    partition = BatchPartition(mesh, samples, (1,))
    whole = torch.zeros(samples, 1, dtype=torch.float64)
    whole[-1] = 5.0

    def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 0.1 + u**2

    with pytest.raises(ConvergenceError, match=r"^step 0 at t = 0, 1 long: the nonlinear solve ended with DIVERGED_"):
        odeint(field, partition.scatter(whole), [0.0, 1.0], method="beuler", step_size=1.0, partition=partition)
