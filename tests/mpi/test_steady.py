"""Steady states of partitioned fields: published equilibria, exact gradients, one answer at every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist import (
    ConfigurationError,
    ConvergenceError,
    DensePartition,
    DisagreementError,
    GridPartition,
    Mesh,
    steady_state,
)
from pnode_dist.exchange import gather_vector, halo
from pnode_dist.ode.steppers.preconditioner import AssembledJacobian
from pnode_dist.steady import SteadySettings, SteadyState, find
from tests.mpi.test_agreement import raised_on_all

pytestmark = pytest.mark.mpi

D = torch.float64
POINTS, REACH = 64, 5
# The equilibria E1, E2, E3 of L = 22: the first wave of a guess with its amplitude, and the energy density <u^2> / 2.
# P. Cvitanovic, R. L. Davidchack, E. Siminos, SIAM J. Appl. Dyn. Syst. 9 (2010).
EQUILIBRIA = {"E1": (1, 1.0, 0.2609), "E2": (2, 1.0, 0.4382), "E3": (3, 2.0, 1.5876)}
SOLVED = {"ksp_rtol": 1e-8, "ksp_gmres_restart": 100}


def stencil(order: int) -> torch.Tensor:
    """The weights `[2 REACH + 1]` of a central difference on points of unit spacing."""
    offsets = torch.arange(-REACH, REACH + 1, dtype=D)
    powers = torch.stack([offsets**power for power in range(len(offsets))])
    wanted = torch.zeros(len(offsets), dtype=D)
    wanted[order] = math.factorial(order)
    return torch.linalg.solve(powers, wanted)


STENCILS = {order: stencil(order) for order in (1, 2, 4)}


@dataclass
class KuramotoSivashinsky:
    """du/dt = -u u_x - u_xx - nu u_xxxx on a periodic line `[x, 1]`, by central differences of 11 points."""

    partition: GridPartition
    length: torch.Tensor
    nu: torch.Tensor

    def __call__(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        wide = halo(u, self.partition, REACH)
        return -0.5 * self.difference(wide.square(), 1) - self.difference(wide, 2) - self.nu * self.difference(wide, 4)

    def difference(self, wide: torch.Tensor, order: int) -> torch.Tensor:
        rows = len(wide) - 2 * REACH
        terms = (weight * wide[first : first + rows] for first, weight in enumerate(STENCILS[order].tolist()))
        return sum(terms, torch.zeros(rows, 1, dtype=D)) / (self.length / POINTS) ** order


@dataclass
class Line:
    """The equation with its parameters on all ranks, and guesses."""

    mesh: Mesh
    func: KuramotoSivashinsky

    @property
    def grid(self) -> GridPartition:
        return self.func.partition

    def wave(self, number: int, shift: float = 0.0) -> torch.Tensor:
        points = torch.arange(*self.grid.owned[0], dtype=D)[:, None]
        return torch.sin(2 * math.pi * (number * points / POINTS + shift))

    def energy(self, u: torch.Tensor) -> torch.Tensor:
        """This rank's share of <u^2> / 2."""
        return u.square().sum() / (2 * POINTS)

    def total(self, share: torch.Tensor) -> float:
        return float(self.grid.comm.allreduce(share.item()))

    def equilibrium(self, name: str, start: torch.Tensor | None = None, **settings: Any) -> SteadyState:
        """The phase vectors fix the translation, and the mean, which the equation conserves."""
        number, amplitude, _ = EQUILIBRIA[name]
        phase = (self.wave(number, 0.25), torch.ones_like(self.wave(number)))
        chosen = {"preconditioner": AssembledJacobian(REACH), "options": {"pc_type": "redundant", **SOLVED}, **settings}
        settings = {"partition": self.grid, "phase": phase, "rtol": 1e-12, **chosen}
        guess = amplitude * self.wave(number) if start is None else start
        return find(self.func, guess, SteadySettings(**settings))


def line_of(mesh: Mesh, length: float = 22.0, nu: float = 1.0) -> Line:
    grid = GridPartition(mesh, (POINTS,), 1, "periodic", REACH)
    parameters = (torch.tensor(value, dtype=D, requires_grad=True) for value in (length, nu))
    return Line(mesh, KuramotoSivashinsky(grid, *parameters))


def whole_equation(u: torch.Tensor, length: torch.Tensor, nu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The right-hand side on the whole line `[x]` and its Jacobian `[x, x]`, in plain torch by dense matrices."""
    unit = torch.eye(POINTS, dtype=D)

    def matrix(order: int) -> torch.Tensor:
        bands = [weight * unit.roll(offset - REACH, 1) for offset, weight in enumerate(STENCILS[order].tolist())]
        return torch.stack(bands).sum(0) / (length / POINTS) ** order

    first, second, fourth = map(matrix, (1, 2, 4))
    return -0.5 * first @ u**2 - second @ u - nu * fourth @ u, -first * u - second - nu * fourth


def bordered_newton(
    f: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor, vectors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Newton's method for f(u) + V^T c = 0 and V (u - u0) = 0 with dense matrices: u, and the last bordered matrix."""
    count = len(vectors)
    unknown = torch.cat([start, torch.zeros(count, dtype=D)])
    corner = torch.zeros(count, count, dtype=D)
    for _ in range(10):
        u, weights = unknown[:POINTS], unknown[POINTS:]
        value, jacobian = f(u)
        matrix = torch.cat([torch.cat([jacobian, vectors.T], 1), torch.cat([vectors, corner], 1)])
        residual = torch.cat([value + weights @ vectors, vectors @ (u - start)])
        unknown = unknown - torch.linalg.solve(matrix, residual)
    return unknown[:POINTS], matrix


@pytest.mark.parametrize("name", EQUILIBRIA)
def test_equilibria_of_kuramoto_sivashinsky_have_the_published_energies(name: str, mesh: Mesh) -> None:
    line = line_of(mesh)
    found = line.equilibrium(name)
    assert round(line.total(line.energy(found.u)), 4) == EQUILIBRIA[name][2]
    # The preconditioner contains the phase conditions: without it there are some 50 linear iterations in each of these.
    assert found.linear_iterations <= 4 * found.iterations
    share = line.energy(found.u)
    gradients = torch.autograd.grad(share, (line.func.length, line.func.nu))
    number, amplitude, _ = EQUILIBRIA[name]
    angles = 2 * math.pi * number * torch.arange(POINTS, dtype=D) / POINTS
    vectors = torch.stack([torch.cos(angles), torch.ones(POINTS, dtype=D)])
    length, nu = (torch.tensor(value, dtype=D, requires_grad=True) for value in (22.0, 1.0))
    with torch.no_grad():
        u, matrix = bordered_newton(lambda u: whole_equation(u, length, nu), amplitude * torch.sin(angles), vectors)
    first, last = line.grid.owned[0]
    assert float((found.u.detach()[:, 0] - u[first:last]).abs().max()) <= 1e-10
    weights = torch.linalg.solve(matrix.T, torch.cat([u / POINTS, torch.zeros(2, dtype=D)]))[:POINTS]
    expected = torch.autograd.grad(whole_equation(u, length, nu)[0], (length, nu), -weights)
    for gradient, value in zip(gradients, expected, strict=True):
        assert abs(line.total(gradient) - value.item()) <= 1e-10 * abs(value.item())


@pytest.mark.parametrize("one", ["length", "nu"])
def test_the_gradient_of_an_energy_is_that_of_central_differences(one: str, mesh: Mesh) -> None:
    step, centre = 1e-5, {"length": 22.0, "nu": 1.0}
    line = line_of(mesh)
    centre_state = line.equilibrium("E2").u
    assert isinstance(centre_state, torch.Tensor)
    (gradient,) = torch.autograd.grad(line.energy(centre_state), getattr(line.func, one))
    ends = []
    for sign in (1, -1):
        moved = line_of(mesh, **{**centre, one: centre[one] + sign * step})
        with torch.no_grad():
            end = moved.equilibrium("E2", centre_state.detach(), rtol=1e-8)
            ends.append(moved.total(moved.energy(end.u)))
    difference = (ends[0] - ends[1]) / (2 * step)
    assert abs(line.total(gradient) - difference) <= 1e-7 * abs(difference)


@pytest.mark.nightly
@pytest.mark.parametrize("name", EQUILIBRIA)
@pytest.mark.parametrize("solver", ["newtonls", "newtontr", "pseudo"])
def test_every_solver_finds_an_equilibrium_without_a_preconditioner(name: str, solver: str, mesh: Mesh) -> None:
    line = line_of(mesh)
    options = {**SOLVED, "pc_type": "none"}
    # From a guess this far pseudo-time steps lead to a stable state, which no equilibrium of L = 22 is.
    settings: dict[str, Any] = {"step_size": 1e3} if solver == "pseudo" else {}
    found = line.equilibrium(name, solver=solver, preconditioner=None, options=options, **settings)
    assert round(line.total(line.energy(found.u)), 4) == EQUILIBRIA[name][2]


def coupled(partition: DensePartition) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Bistable components, weakly coupled through their mean."""

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u - u**3 - 0.1 * gather_vector(u, partition).mean()

    return func


def test_deflation_finds_the_same_states_on_uneven_and_empty_ranks(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 3)
    start = torch.tensor([0.9, 0.2, -0.5], dtype=D)[partition.owned[0] : partition.owned[1]]
    alone = DensePartition(MPI.COMM_SELF, 3)
    known: list[torch.Tensor] = []
    known_alone: list[torch.Tensor] = []
    for _ in range(3):
        known.append(steady_state(coupled(partition), start, partition=partition, deflate=known, rtol=1e-13))
        whole = torch.tensor([0.9, 0.2, -0.5], dtype=D)
        known_alone.append(steady_state(coupled(alone), whole, partition=alone, deflate=known_alone, rtol=1e-13))
        assert float((gather_vector(known[-1], partition) - known_alone[-1]).abs().max()) <= 1e-11
    states = torch.stack(known_alone)
    assert float((states[:, None] - states).norm(dim=2)[~torch.eye(3, dtype=torch.bool)].min()) > 0.1


def test_ranks_that_ask_for_different_steady_states_all_raise_and_go_on(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 4 * mesh.size)
    start, first = torch.full((4,), 0.9, dtype=D), mesh.rank == 0

    def solve(**settings: Any) -> torch.Tensor:
        found: torch.Tensor = steady_state(coupled(partition), start, partition=partition, **settings)
        return found

    if mesh.size > 1:
        text = raised_on_all(DisagreementError, lambda: solve(rtol=1e-8 if first else 1e-9))
        assert "the ranks differ in rtol: rank 0: 1e-08" in text
        text = raised_on_all(DisagreementError, lambda: solve(deflate=torch.zeros_like(start) if first else ()))
        assert "number of states in deflate: rank 0: 1" in text
        text = raised_on_all(ConfigurationError, lambda: solve(solver="newton" if first else "newtonls"))
        assert "solver = 'newton': must be one of" in text
    assert "DIVERGED_MAX_IT" in raised_on_all(ConvergenceError, lambda: solve(max_it=1, rtol=1e-13))
    settled = math.sqrt(0.9)
    assert float((solve(rtol=1e-13) - settled).abs().max()) <= 1e-12


def test_ranks_that_do_not_take_the_same_backward_pass_all_raise(mesh: Mesh) -> None:
    if mesh.size == 1:
        pytest.skip("one rank has nothing to differ from")
    line = line_of(mesh)
    share = line.energy(line.equilibrium("E2").u)
    once = {} if mesh.rank == 0 else None

    def reverse() -> None:
        if once is None:
            steady_state(
                lambda t, u: 1 - u, torch.zeros(3, dtype=D), partition=DensePartition(line.grid.comm, 3 * mesh.size)
            )
        else:
            share.backward()

    assert "the ranks do not make the same call" in raised_on_all(DisagreementError, reverse)
