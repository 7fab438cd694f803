"""The step that is taken to measure its tape is a step like any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pnode_dist import NeuralODE, Trajectory


class Scaled(nn.Module):
    """A layer times a factor that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.factor = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64), requires_grad=False)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(u)) * self.factor


@pytest.mark.parametrize("keep", ["auto", "graph", "solution"])
def test_a_write_into_what_the_first_step_saved_is_refused_as_in_later_solves(keep: str) -> None:
    node = NeuralODE(Scaled(), method="euler", step_size=1.0, trajectory=Trajectory("1MiB", keep=keep))
    for _ in range(2):
        loss = node(torch.ones(3, dtype=torch.float64), [0.0, 1.0])[-1].sum()
        assert node.last_solve.graph_steps == 1
        with torch.no_grad():
            node.func.factor.fill_(3.0)  # type: ignore[union-attr, operator]
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()
