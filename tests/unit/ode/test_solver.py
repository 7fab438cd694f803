"""What a solver keeps between its solves."""

from __future__ import annotations

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory
from pnode_dist.bench.methods.heap import bytes_in_use
from pnode_dist.checkpointing.plan import best
from pnode_dist.ode import methods, solver
from pnode_dist.ode.rhs.layout import layout_of
from pnode_dist.ode.solver import Solver
from tests.oracles.right_hand_sides import Network

KIB = 2**10


def make(trajectory: Trajectory) -> Solver:
    layout, _ = layout_of(torch.zeros(3, 4, dtype=torch.float64))
    return Solver.create(None, layout, methods.resolve("dopri5"), (4, 4), {}, trajectory)


def test_one_of_explicit_steps_holds_some_kilobytes_before_it_solves() -> None:
    trajectory = Trajectory(ram="1MiB")
    made = [make(trajectory) for _ in range(3)]
    before = bytes_in_use()
    made += [make(trajectory) for _ in range(20)]
    assert (bytes_in_use() - before) / 20 < 6 * KIB
    assert len(made) == 23


def test_the_plan_of_solves_alike_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def counted(*arguments: object) -> object:
        chosen.append(arguments)
        return best(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(solver, "best", counted)
    node = NeuralODE(Network(3), method="euler", step_size=0.25, trajectory=Trajectory(ram="1MiB"))
    start = torch.ones(2, 3, dtype=torch.float64)
    for _ in range(3):
        node(start, (0.0, 1.0)).sum().backward()
    assert len(chosen) == 1
    node(start, (0.0, 2.0)).sum().backward()
    assert len(chosen) == 2
