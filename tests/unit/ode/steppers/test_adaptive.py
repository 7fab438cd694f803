"""Steps with error control: as exact as asked, replayed to the last bit, and differentiated as they were taken."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torchdiffeq

from pnode_dist import ConfigurationError, NeuralODE, Trajectory, odeint
from pnode_dist.errors import StepSizeError
from pnode_dist.ode import adaptive_pass
from pnode_dist.ode.methods import METHODS
from pnode_dist.ode.time_grid import TimeGrid
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

ADAPTIVE = [method.name for method in METHODS.values() if method.family == "rk" and method.estimates_error]
# The estimate of fehlberg2 is h^2 / 512 times the change of f; the error of its second-order result is of order h^2.
TIMES_TOLERANCE = {"fehlberg2": 512}
FIXED = [method.name for method in METHODS.values() if method.family == "rk" and not method.estimates_error]
TIMES = [0.0, 0.4, 1.0, 2.5]
LONG = [0.0, 2.5, 3.0]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[TimeGrid]:
    """The steps that solves with error control have accepted."""
    seen: list[TimeGrid] = []

    def remembering(*arguments: Any) -> TimeGrid:
        seen.append(TimeGrid(*arguments))
        return seen[-1]

    monkeypatch.setattr(adaptive_pass, "TimeGrid", remembering)
    return seen


def along(func: Callable[..., torch.Tensor], u: torch.Tensor, grid: TimeGrid, table: str) -> torch.Tensor:
    """The steps of a grid in plain torch: the states at the output times."""
    states = {0: u}
    for number, (start, size) in enumerate(zip(grid.starts, grid.sizes, strict=True), start=1):
        u = odeint_plain(func, u, [start, start + size], TABLEAUX[table], abs(size))[-1]
        if number in grid.outputs:
            states[grid.outputs[number]] = u
    return torch.stack([states[key] for key in sorted(states)])


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_solution_is_as_exact_as_asked(method: str) -> None:
    network, u0 = Network(), random(4, 3)
    exact = torchdiffeq.odeint(network, u0, torch.tensor(TIMES).double(), rtol=1e-11, atol=1e-12, method="dopri5")
    for tolerance in (1e-3, 1e-6):
        found = odeint(network, u0, TIMES, method=method, rtol=tolerance, atol=tolerance)
        error = float((found - exact).detach().abs().max())
        assert error < TIMES_TOLERANCE.get(method, 20) * tolerance
    assert error > 1e-14


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", ["heun", "bosh3", "fehlberg5", "dopri5", "verner8", "dop853"])
def test_the_gradient_is_that_of_the_accepted_steps_in_plain_torch(
    method: str, times: list[float], grids: list[TimeGrid]
) -> None:
    network, u0 = Network(), random(2, 3)
    found = gradients(
        lambda u: odeint(network, u, times, method=method, rtol=1e-5, atol=1e-6), u0, list(network.parameters())
    )
    (grid,) = grids
    assert grid.starts[0] == times[0]
    assert sorted(grid.outputs.values()) == [0, 1, 2, 3]
    wanted = gradients(lambda u: along(network, u, grid, METHODS[method].petsc_name), u0, list(network.parameters()))
    assert distance(found, wanted) < 1e-12


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_gradient_has_the_same_bits_under_every_budget(method: str, tmp_path: Path) -> None:
    network, u0 = Network(), 3 * random(2, 3)
    # A first step that is far too long: attempts are rejected, and their states undone to the last bit.
    rtol, atol = (1e-6, 1e-7) if METHODS[method].order > 3 else (1e-3, 1e-5)
    rtol, atol = (1e-10, 1e-11) if method == "dop853" else (rtol, atol)
    node = NeuralODE(network, method=method, rtol=rtol, atol=atol, step_size=2.5, trajectory=Trajectory("1MiB"))
    parameters = list(network.parameters())
    ample = gradients(lambda u: node(u, LONG), u0, parameters)
    assert node.last_solve.rejected_steps > 0
    graph_bytes = node.last_solve.graph_bytes
    assert node.last_solve.recomputed_steps == 0
    for trajectory in (
        Trajectory(keep="solution"),
        Trajectory(ram=graph_bytes // 2),
        Trajectory(ram_slots=1),
        Trajectory(ram_slots=3),
        Trajectory(ram_slots=2, disk_slots=2, directory=tmp_path),
        Trajectory(ram_slots=0, disk_slots=3, directory=tmp_path),
    ):
        node.trajectory = trajectory
        assert identical(gradients(lambda u: node(u, LONG), u0, parameters), ample), trajectory
        assert node.last_solve.recomputed_steps >= node.last_solve.forward_steps > 3
    node.trajectory = Trajectory(keep="stages")
    assert distance(gradients(lambda u: node(u, LONG), u0, parameters), ample) <= 1e-14


@pytest.mark.parametrize(("method", "rtol"), [("dopri5", 1e-6), ("heun", 1e-3), ("verner7", 1e-6)])
def test_states_of_the_backward_pass_are_those_of_the_forward_pass_to_the_last_bit(method: str, rtol: float) -> None:
    # What f counts in its own names is undone by the backward pass, but not in objects of the standard library.
    compared: deque[bytes] = deque()
    backward = Event()

    class Watching(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            bits = u.detach().numpy().tobytes()
            if backward.is_set():
                compared.append(bits)
                assert (float(t), bits) in states
            else:
                states.add((float(t), bits))
            return super().forward(t, u)

    states: set[tuple[float, bytes]] = set()
    node = NeuralODE(Watching(), method=method, rtol=rtol, atol=rtol / 100, trajectory=Trajectory(ram_slots=1))
    loss = node(random(2, 3).requires_grad_(), TIMES).square().sum()
    backward.set()
    loss.backward()
    assert len(compared) > 100


def test_fsal_methods_reuse_the_last_evaluation_of_a_step_in_the_next() -> None:
    node = NeuralODE(Network(), method="dopri5", rtol=1e-7, atol=1e-9, step_size=0.01)
    with torch.no_grad():
        node(random(2, 3), [0.0, 2.0])
    solve = node.last_solve
    assert solve.forward_steps > 10
    assert solve.function_evaluations == 6 * (solve.forward_steps + solve.rejected_steps) + 1


def test_a_rejected_attempt_does_not_evaluate_its_first_stage_again() -> None:
    node = NeuralODE(Network(), method="fehlberg5", rtol=1e-8, atol=1e-10, step_size=2.0)
    with torch.no_grad():
        node(random(2, 3), [0.0, 2.0])
    solve = node.last_solve
    assert solve.rejected_steps > 0
    assert solve.function_evaluations == 6 * solve.forward_steps + 5 * solve.rejected_steps


def test_graphs_are_kept_while_they_fit_and_given_up_when_they_do_not() -> None:
    network, u0 = Network(), random(2, 3, seed=4).requires_grad_()
    node = NeuralODE(network, method="dopri5", rtol=1e-8, atol=1e-9, trajectory=Trajectory("1MiB"))
    node(u0, TIMES)[-1].sum().backward()
    ample = node.last_solve
    assert ample.graph_steps == ample.forward_steps
    assert ample.vjps == 6 * ample.forward_steps
    node.trajectory = Trajectory(ram=ample.graph_bytes // 2)
    node(u0, TIMES)[-1].sum().backward()
    assert node.last_solve.graph_steps == 0
    assert node.last_solve.recomputed_steps >= node.last_solve.forward_steps
    node.trajectory = Trajectory(ram=ample.graph_bytes // 2, keep="graph")
    with pytest.raises(ConfigurationError, match=r"keep = 'graph': the graphs of the first [0-9]+ steps fill ram"):
        node(u0, TIMES)
    assert node.trajectory.ledger.ram == 0


def test_as_many_graphs_are_kept_as_fit_beside_a_checkpoint_for_each_but_the_first() -> None:
    network, u0 = Network(), random(2, 3, seed=4).requires_grad_()
    node = NeuralODE(network, method="dopri5", rtol=1e-8, atol=1e-9, trajectory=Trajectory("1MiB"))
    node(u0, TIMES)[-1].sum().backward()
    steps = node.last_solve.graph_steps
    needed = node.last_solve.graph_bytes + (steps - 1) * u0.numel() * 8
    for ram, kept in ((needed, steps), (needed - 1, 0)):
        node.trajectory = Trajectory(ram=ram)
        node(u0, TIMES)[-1].sum().backward()
        assert node.last_solve.graph_steps == kept


def test_a_second_backward_pass_replays_the_accepted_steps() -> None:
    network, u0 = Network(), random(2, 3).requires_grad_()
    node = NeuralODE(network, method="bosh3", rtol=1e-6, atol=1e-8, step_size=2.0, trajectory=Trajectory(ram_slots=3))
    loss = node(u0, TIMES).square().sum()
    wanted = [u0, *network.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    rejected = node.last_solve.rejected_steps
    assert rejected > 0
    assert identical(torch.autograd.grad(loss, wanted), first)
    assert node.last_solve.rejected_steps == rejected


def test_tolerances_may_differ_from_component_to_component() -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cos(40 * t), -u[1]])

    u0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    tight = NeuralODE(func, method="dopri5", rtol=1e-8, atol=1e-8)
    loose = NeuralODE(func, method="dopri5", rtol=1e-8, atol=torch.tensor([1e3, 1e-8], dtype=torch.float64))
    tight(u0, [0.0, 1.0])
    end = loose(u0, [0.0, 1.0])[-1]
    assert loose.last_solve.forward_steps < tight.last_solve.forward_steps / 4
    assert float(end[1]) == pytest.approx(float(torch.exp(torch.tensor(-1.0, dtype=torch.float64))), abs=1e-7)


def test_tolerances_of_a_tuple_state_are_given_part_by_part() -> None:
    def func(t: torch.Tensor, u: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return -u[0], torch.cos(40 * t) + u[1]

    u0 = (torch.ones(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    node = NeuralODE(func, rtol=1e-7, atol=(torch.tensor(1e-7), torch.tensor(1e3)), step_size=0.01)
    node(u0, [0.0, 1.0])
    loose = node.last_solve.forward_steps
    node.atol = 1e-7
    node(u0, [0.0, 1.0])
    assert loose < node.last_solve.forward_steps / 4


@pytest.mark.parametrize("adaptor", ["basic", "dsp"])
def test_every_adaptor_keeps_the_error_within_bounds(adaptor: str) -> None:
    network, u0 = Network(), random(4, 3)
    exact = torchdiffeq.odeint(network, u0, torch.tensor(TIMES).double(), rtol=1e-11, atol=1e-12, method="dopri5")
    node = NeuralODE(network, method="bosh3", rtol=1e-6, atol=1e-6, adaptor=adaptor)
    assert float((node(u0, TIMES) - exact).detach().abs().max()) < 2e-5


def test_a_state_in_float32_is_solved_in_petsc_s_scalar_type() -> None:
    network, u0 = Network(dtype=torch.float32), random(2, 3, dtype=torch.float32).requires_grad_()
    node = NeuralODE(network, rtol=1e-5, atol=1e-6, trajectory=Trajectory("1MiB"))
    found = torch.autograd.grad(node(u0, TIMES).sum(), [u0, *network.parameters()])
    node.trajectory = Trajectory(ram_slots=2)
    again = torch.autograd.grad(node(u0, TIMES).sum(), [u0, *network.parameters()])
    assert identical(found, again)
    assert found[0].dtype == torch.float32


def test_a_single_time_is_answered_with_the_initial_state() -> None:
    u0 = random(2, 3).requires_grad_()
    states = odeint(Network(), u0, [0.3], rtol=1e-6)
    states.sum().backward()
    assert torch.equal(states[0], u0)
    assert torch.equal(u0.grad, torch.ones_like(u0))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", FIXED)
def test_a_method_without_an_error_estimate_is_refused_naming_those_that_have_one(method: str) -> None:
    with pytest.raises(ConfigurationError, match=f"method = '{method}': has no error estimate.* dopri5"):
        odeint(Network(), random(2, 3), TIMES, method=method, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rtol": 0.0}, "rtol = 0.0: must be positive"),
        ({"atol": -1e-9}, "atol = -1e-09: must be positive"),
        ({"rtol": float("nan")}, "rtol = nan: must be positive"),
        ({"atol": torch.tensor([1e-6, 0.0, 1e-6])}, "atol: every entry must be positive"),
        ({"atol": torch.ones(5)}, r"atol: shape \(5,\) does not broadcast"),
        ({"atol": (1e-6, 1e-6)}, "atol: 2 parts for a state of 1"),
        ({"rtol": 1e-6, "adaptor": "magic"}, "adaptor = 'magic': must be one of basic, dsp"),
    ],
)
def test_tolerances_that_make_no_sense_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        odeint(Network(), random(2, 3), TIMES, **settings)


@pytest.mark.parametrize("blowing_up", [True, False], ids=["a pole", "not a number"])
def test_where_no_step_meets_the_tolerances_it_says_so(blowing_up: bool) -> None:
    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u.square() if blowing_up else torch.where(t > 0.5, torch.nan, 1.0) * u

    with pytest.raises(StepSizeError, match=r"step [0-9]+ at t = (1|0\.5)") as caught:
        odeint(func, torch.ones(1, dtype=torch.float64), [0.0, 2.0], rtol=1e-6, atol=1e-9)
    assert "\n" not in str(caught.value)
