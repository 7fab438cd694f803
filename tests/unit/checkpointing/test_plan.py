"""A memory budget is divided between graphs and checkpoints so that the fewest steps are run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.checkpointing.binomial import optimal_forward_steps
from pnode_dist.checkpointing.budget import Slots
from pnode_dist.checkpointing.plan import Plan, best
from pnode_dist.checkpointing.schedule import Adjoint, Advance, EndForward, Record
from tests.oracles.checkpointing import fewest_solve_steps_within


def forward_steps(plan: Plan) -> int:
    """Counted from the schedule itself."""
    total = 0
    for action in plan.actions():
        if isinstance(action, Advance):
            total += action.last - action.first
        total += isinstance(action, Record)
    return total


@pytest.mark.parametrize(("steps", "slots", "published"), [(100, 8, 345), (1000, 8, 5285), (1, 0, 1), (2, 1, 3)])
def test_the_optimum_is_the_published_one(steps: int, slots: int, published: int) -> None:
    assert optimal_forward_steps(steps, slots) == published


@given(
    steps=st.integers(2, 60),
    ram=st.integers(0, 4000),
    disk=st.integers(0, 5),
    checkpoint=st.integers(1, 50),
    graph=st.integers(1, 500),
)
def test_a_division_fits_the_budget_and_no_other_needs_fewer_steps(
    steps: int, ram: int, disk: int, checkpoint: int, graph: int
) -> None:
    base = Slots(min(ram // checkpoint, steps - 1), min(disk, steps - 1), checkpoint, ram)
    chosen = best(Trajectory(ram=ram), base, steps, graph, None).chosen
    assert chosen.ram_bytes == chosen.ram * checkpoint + chosen.kept * graph <= ram
    assert chosen.disk <= disk
    fewest = fewest_solve_steps_within(ram, steps, checkpoint, graph, most_tapes=steps, disk=disk)
    assert forward_steps(chosen) == chosen.forward_steps == fewest


@given(steps=st.integers(1, 40), graphs=st.integers(1, 40), slots=st.integers(1, 6))
def test_every_step_is_recorded_before_its_adjoint_and_reversed_in_order(steps: int, graphs: int, slots: int) -> None:
    recorded: set[int] = set()
    adjoints = []
    kept = None
    budget = Slots(min(slots, steps - 1), 0, 1, min(graphs, steps) * 1000 + slots)
    plan = best(Trajectory(ram=budget.ram_bytes), budget, steps, 1000, None).chosen
    for action in plan.actions():
        if isinstance(action, Record):
            recorded.add(action.step)
        elif isinstance(action, EndForward):
            kept = len(recorded)
        elif isinstance(action, Adjoint):
            recorded.remove(action.step)
            adjoints.append(action.step)
    assert adjoints == list(reversed(range(steps)))
    assert kept == plan.kept <= graphs
    assert not recorded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.layers(u) * torch.cos(t)


def gradient(trajectory: Trajectory, method: str = "rk4") -> tuple[torch.Tensor, NeuralODE]:
    torch.manual_seed(1)
    node = NeuralODE(Net(), method=method, step_size=0.05, trajectory=trajectory)
    u0 = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss = node(u0, [0.0, 0.4, 1.0]).square().sum()
    gradients = torch.autograd.grad(loss, [u0, *node.parameters()])
    return torch.cat([value.reshape(-1) for value in gradients]), node


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "verner8"])
def test_graphs_from_the_forward_pass_give_the_bits_that_recomputed_ones_give(method: str) -> None:
    expected, recomputing = gradient(Trajectory(keep="solution"), method)
    everything, keeping = gradient(Trajectory(keep="graph"), method)
    some, mixing = gradient(Trajectory(ram=keeping.last_solve.graph_bytes // 2), method)
    assert torch.equal(expected, everything)
    assert torch.equal(expected, some)
    assert recomputing.last_solve.recomputed_steps == 19
    assert keeping.last_solve.recomputed_steps == 0
    assert 0 < mixing.last_solve.recomputed_steps < 19
    assert 1 < mixing.last_solve.graph_steps < 20


def test_no_stage_is_evaluated_twice_when_every_graph_is_kept() -> None:
    _, node = gradient(Trajectory())
    assert node.last_solve.function_evaluations == node.last_solve.vjps == 20 * 4


def test_the_measured_graph_is_what_autograd_holds() -> None:
    _, node = gradient(Trajectory(keep="graph"), method="euler")
    batch, inputs, hidden, scalar = 5, 3, 8, 8
    # The state, the hidden layer after tanh, perhaps also before it, and the output before and after the factor cos t;
    # cos t itself.
    least = scalar * (batch * (inputs + hidden) + 1)
    most = scalar * (batch * (2 * inputs + 2 * hidden + 2 * inputs) + 4)
    assert least <= node.last_solve.graph_bytes / 20 <= most


def test_demanding_more_graphs_than_fit_names_the_budget_that_works() -> None:
    with pytest.raises(ConfigurationError, match=r"the graphs of 20 steps need ram = \d+, more than '1kB'"):
        gradient(Trajectory(ram="1kB", keep="graph"))


def test_an_unknown_level_is_refused_naming_the_known() -> None:
    with pytest.raises(ConfigurationError, match="keep = 'all': must be one of auto, solution, stages, graph"):
        Trajectory(keep="all")
