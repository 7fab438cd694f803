"""Ranks that own nothing of a state, and states without an entry: every family of methods, every tape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnode_dist import BatchPartition, Mesh, NeuralODE, SplitFunction, Trajectory, odeint
from pnode_dist.exchange import global_sum
from tests.oracles.right_hand_sides import distance
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

TIMES = [0.0, 0.3, 0.5]
D = torch.float64
TIGHT = {"snes_rtol": 1e-13, "snes_stol": 1e-15, "ksp_rtol": 1e-13}

CASES: dict[str, dict[str, Any]] = {
    "rk": {"step_size": 0.1},
    "rk, stages": {"step_size": 0.1, "trajectory": Trajectory(ram_slots=1, keep="stages")},
    "rk, solution": {"step_size": 0.1, "trajectory": Trajectory(ram_slots=1, keep="solution")},
    "rk, control": {"rtol": 1e-10, "atol": 1e-12},
    "rk, jumps": {"step_size": 0.1, "jumps": [0.1, 0.3]},
    "theta, petsc": {"method": "cn", "step_size": 0.01, "newton": "petsc", "options": TIGHT},
    "theta, batch": {"method": "cn", "step_size": 0.01, "newton": "batch"},
    "theta, control": {"method": "cn", "rtol": 1e-6, "atol": 1e-8},
    "arkimex, petsc": {"method": "arkimex_4", "step_size": 0.05, "newton": "petsc", "options": TIGHT},
    "arkimex, batch": {"method": "arkimex_4", "step_size": 0.05, "newton": "batch"},
    "dirk": {"method": "dirk_s212", "step_size": 0.02},
    "ssp": {"method": "ssp_rks3", "step_size": 0.05},
    "rosw": {"method": "rosw_ra34pw2", "step_size": 0.05},
    "bdf": {"method": "bdf", "step_size": 0.005},
}
NOT_DIFFERENTIATED = ("ssp", "rosw", "bdf")
OFTEN = ("rk", "theta, batch")
EVERY = [case if case in OFTEN else pytest.param(case, marks=pytest.mark.nightly) for case in CASES]


def weights() -> torch.Tensor:
    matrix = torch.tensor([[-0.5, 0.2, 0.0], [0.1, -0.3, 0.2], [0.0, 0.1, -0.4]], dtype=D)
    return matrix.requires_grad_()


def right_hand_side(matrix: torch.Tensor, case: str) -> Any:
    """tanh(W u) - u, split for the semi-implicit methods."""
    if case.startswith("arkimex"):
        return SplitFunction(implicit=lambda t, u: -u, explicit=lambda t, u: torch.tanh(u @ matrix.T))
    return lambda t, u: torch.tanh(u @ matrix.T) - u


@pytest.mark.parametrize("case", EVERY)
def test_one_sample_on_several_ranks_is_solved_by_its_owner(case: str, mesh: Mesh) -> None:
    partition, matrix = BatchPartition(mesh, 1, (3,)), weights()
    begin, end = partition.owned
    whole = torch.tensor([[1.0, -2.0, 0.5]], dtype=D, requires_grad=True)
    u0 = whole.detach()[begin:end].clone().requires_grad_()
    differentiated = case not in NOT_DIFFERENTIATED
    with torch.set_grad_enabled(differentiated):
        found = odeint(right_hand_side(matrix, case), u0, TIMES, partition=partition, **CASES[case])
    wanted = odeint_plain(right_hand_side(matrix, "rk"), whole, TIMES, TABLEAUX["8dp"], 0.05)
    # Against the exact solution: the error of the methods.
    assert distance(found.detach(), wanted.detach()[:, begin:end]) < 1e-4
    if not differentiated:
        return
    own = torch.autograd.grad(found.sin().sum(), [u0, matrix])
    expected = torch.autograd.grad(wanted.sin().sum(), [whole, matrix])
    assert distance(own[0], expected[0][begin:end]) < 1e-3
    assert distance(mesh.sum(own[1]), expected[1]) < 1e-3
    if mesh.size > 1 and begin == end:
        assert own[1].abs().max() == 0


def test_a_rank_without_entries_takes_part_in_exchanges(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 1, (3,))
    begin, end = partition.owned
    whole = torch.tensor([[1.0, -2.0, 0.5]], dtype=D, requires_grad=True)
    u0 = whole.detach()[begin:end].clone().requires_grad_()
    found = odeint(
        lambda t, u: -u * global_sum(u.square().sum(), partition.comm), u0, TIMES, step_size=0.1, partition=partition
    )
    wanted = odeint_plain(lambda t, u: -u * u.square().sum(), whole, TIMES, TABLEAUX["4"], 0.1)
    assert distance(found.detach(), wanted.detach()[:, begin:end]) < 1e-12
    (own,), (expected,) = (torch.autograd.grad(out.sin().sum(), at) for out, at in ((found, u0), (wanted, whole)))
    assert distance(own, expected[begin:end]) < 1e-12


@pytest.mark.parametrize("case", EVERY)
def test_a_state_without_entries_has_outputs_and_gradients_without_entries(case: str) -> None:
    matrix, u0 = weights(), torch.ones(0, 3, dtype=D, requires_grad=True)
    with torch.set_grad_enabled(case not in NOT_DIFFERENTIATED):
        found = odeint(right_hand_side(matrix, case), u0, TIMES, **CASES[case])
    assert found.shape == (3, 0, 3)
    if case not in NOT_DIFFERENTIATED:
        by_state, by_matrix = torch.autograd.grad(found.sum(), [u0, matrix])
        assert by_state.shape == (0, 3)
        assert torch.equal(by_matrix, torch.zeros(3, 3, dtype=D))


def test_an_empty_part_beside_another_one_changes_nothing() -> None:
    full, empty = torch.ones(2, dtype=D, requires_grad=True), torch.ones(0, dtype=torch.complex128, requires_grad=True)
    node = NeuralODE(lambda t, u: (-u[0], 1j * u[1]), step_size=0.1)
    found, none = node((full, empty), TIMES)
    assert none.shape == (3, 0)
    assert torch.equal(found, odeint(lambda t, u: -u, full, TIMES, step_size=0.1))
    states, tangents = node.jvp((full, empty), TIMES, (torch.ones_like(full), torch.ones_like(empty)))
    assert distance(tangents[0].detach(), states[0].detach()) < 1e-14
    (gradient,) = torch.autograd.grad(found.sum(), full, create_graph=True)
    assert gradient.shape == (2,)
