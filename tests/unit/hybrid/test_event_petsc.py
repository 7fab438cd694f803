"""A system with two modes has the event times and sensitivities that PETSc's own tutorial prints.

`src/ts/tutorials/hybrid/ex1adj.c` of PETSc 3.26.1: du/dt = A_i u from (0, 1), where the mode i changes from 1 to 2 at
u[1] = 2.75 u[0], and back at u[1] = 0.36 u[0]. (H. Zhang, S. Abhyankar, E. Constantinescu, M. Anitescu: Discrete
adjoint sensitivity analysis of hybrid dynamical systems with switching, IEEE Trans. Circuits Syst. I 64 (2017).)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pnode_dist.hybrid.event import Event, EventSolution
from pnode_dist.hybrid.event_solve import solve_events

FLOAT64 = torch.float64
MODES = torch.tensor([[[1.0, -100.0], [10.0, 1.0]], [[1.0, 10.0], [-100.0, 1.0]]], dtype=FLOAT64)
STEP = 1 / 256
# Its output for -ts_monitor -ts_event_tol 1e-13, compiled against PETSc 3.26.1: the steps around the events, which
# TSEvent divides, and the derivatives of both components at t = 0.125 with respect to the first threshold, 2.75.
BEFORE = (0.09375 + 0.00209269, 0.11328125 + 0.00163287)
EVENTS = (BEFORE[0] + 2.0703e-06, BEFORE[1] + 1.59968e-06)
SENSITIVITIES = (-0.101615675246482, 0.070426357163075)
# src/ts/tutorials/hybrid/output/ex1adj_1.out, with the default tolerance of events.
PRINTED = "0.0958448"


def switched(t: list[float], thresholds: torch.Tensor, **settings: Any) -> EventSolution:
    """The third component of the state is the mode, 1 or 2."""

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.cat([MODES[0 if u[2] < 1.5 else 1] @ u[:2], torch.zeros(1, dtype=FLOAT64)])

    def g(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u[1] - thresholds[0 if u[2] < 1.5 else 1] * u[0]

    switch = Event(g, reset=lambda t, u: torch.cat([u[:2], 3 - u[2:]]))
    u0 = torch.tensor([0.0, 1.0, 1.0], dtype=FLOAT64)
    return solve_events(func, u0, t, switch, method="cn", newton="petsc", options={"snes_rtol": 1e-14}, **settings)


def test_the_first_event_of_petscs_tutorial_is_at_its_printed_time() -> None:
    solution = switched([0.0, 0.125], torch.tensor([2.75, 0.36], dtype=FLOAT64), step_size=STEP)
    assert f"{solution.event_times[0].item():.6g}" == PRINTED
    assert solution.which == (0, 0)


@pytest.mark.slow
def test_event_times_and_sensitivities_of_petscs_tutorial_agree_on_its_steps() -> None:
    thresholds = torch.tensor([2.75, 0.36], dtype=FLOAT64, requires_grad=True)
    # PETSc's derivative at an event is that of a step of no length, so steps end just before and after each.
    around = [*BEFORE, *(time + 1e-8 for time in EVENTS)]
    solution = switched(sorted([*(STEP * number for number in range(33)), *around]), thresholds)
    # The steps are printed with 6 digits.
    assert solution.event_times.tolist() == pytest.approx(EVENTS, abs=1e-8)
    for component, wanted in enumerate(SENSITIVITIES):
        (found,) = torch.autograd.grad(solution.u_end[component], thresholds, retain_graph=True)
        assert found[0].item() == pytest.approx(wanted, abs=2e-9)
