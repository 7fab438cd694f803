"""The Jacobian of a steady state's equations, with and without conditions, is that of dense autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mpi4py import MPI

from pnode_dist.ode import methods
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import for_method, layout_of
from pnode_dist.ode.rhs.parameters import Parameters
from pnode_dist.steady.conditions import deflation_of, phase_of
from pnode_dist.steady.system import SteadySystem
from tests.oracles.right_hand_sides import distance

D = torch.float64
N = 5


def equation(u: torch.Tensor) -> torch.Tensor:
    return torch.sin(u).roll(1) - u**3 + 0.3 * u.square().mean()


@pytest.mark.parametrize("conditions", ["none", "phase", "deflation", "both"])
def test_products_and_low_rank_are_those_of_the_dense_jacobian(conditions: str) -> None:
    torch.manual_seed(5)
    comm = MPI.COMM_SELF
    start, u, known, spans = torch.randn(N), torch.randn(N), torch.randn(2, N), torch.randn(2, N)
    start, u, known, spans = (tensor.to(D) for tensor in (start, u, known, spans))
    deflation = deflation_of(comm, known, start) if conditions in ("deflation", "both") else None
    phase = phase_of(comm, spans, start) if conditions in ("phase", "both") else None
    layout = for_method(layout_of(u)[0], methods.resolve("beuler"), None)
    bound = BoundFunction(lambda t, u: equation(u), (), Parameters((), False))
    system = SteadySystem(comm, layout, bound, 0.0, phase, deflation)

    def residual(u: torch.Tensor) -> torch.Tensor:
        found = -equation(u)
        if phase is not None:
            basis = torch.linalg.qr(spans.T)[0]
            found = found - basis @ (basis.T @ found) + basis @ (basis.T @ (u - start))
        if deflation is not None:
            for root in known:
                found = found * (1 / (u - root).square().mean() + 1)
        return found

    shift = 0.0 if deflation is not None else 0.7
    dense = torch.autograd.functional.jacobian(residual, u) + shift * torch.eye(N, dtype=D)
    factor = 1.0 if deflation is None else deflation.factor(u)
    assert distance(factor * system.residual(u), residual(u)) <= 1e-13
    system.linearise(u, shift)
    linearisation = system.linearisation
    assert linearisation is not None
    unit = torch.eye(N, dtype=D)
    assert distance(torch.stack([linearisation.times(row) for row in unit], 1), dense) <= 1e-13
    assert distance(torch.stack([linearisation.transposed_times(row) for row in unit]), dense) <= 1e-13
    plain = replace(linearisation, phase=None, slope=None, residual=None)
    base = torch.stack([plain.times(row) for row in unit], 1)
    change = linearisation.low_rank()
    whole = base if change is None else change.factor * base + change.left.T @ change.right
    assert distance(whole, dense) <= 1e-13
