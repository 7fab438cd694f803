"""One budget for several solves: what one holds the others do not get, and everything is given back in the end."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.checkpointing import budget
from pnode_dist.checkpointing.budget import Ledger
from pnode_dist.checkpointing.store import MemoryPool
from tests.oracles.checkpointing import fewest_solve_steps_within
from tests.oracles.right_hand_sides import Network, gradients, identical, random

# Two by three numbers of 8 bytes; 20 steps. A tape holds the state, the hidden layer of two by five and the time.
CHECKPOINT, STEPS, TIMES = 48, 20, [0.0, 1.0]
TAPE = 48 + 80 + 8


class OopsError(Exception):
    """What the function under test raises."""


class Failing(Network):
    """Raises once it has been evaluated so often.

    The calls are counted in an object of the standard library: what f counts in attributes a backward pass undoes.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = deque(range(calls))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        if not self.left:
            raise OopsError
        self.left.pop()
        return super().forward(t, u)


def node_of(trajectory: Trajectory, func: torch.nn.Module | None = None) -> NeuralODE:
    return NeuralODE(func or Network(), method="euler", step_size=0.05, trajectory=trajectory)


def start() -> torch.Tensor:
    return random(2, 3).requires_grad_()


def in_all(node: NeuralODE) -> int:
    return node.last_solve.forward_steps + node.last_solve.recomputed_steps


def fewest(ram: int, disk: int = 0) -> int:
    """The fewest steps in all with states only, and at most the last step's tape."""
    return fewest_solve_steps_within(ram, STEPS, CHECKPOINT, TAPE, disk=disk)


def books(trajectory: Trajectory) -> tuple[int, int, int]:
    ledger = trajectory.ledger
    return ledger.ram, ledger.disk, ledger.solves


# Sharing


def test_while_one_solve_awaits_its_backward_pass_the_next_gets_what_is_left() -> None:
    # A tape and two checkpoints go to a solve that can use no more: four steps.
    ram, used = 7 * CHECKPOINT + 7, TAPE + 2 * CHECKPOINT
    trajectory = Trajectory(ram=ram, keep="solution")
    first, second = node_of(trajectory), node_of(trajectory)
    one = first(start(), [0.0, 0.2])
    assert books(trajectory) == (used, 0, 1)
    two = second(start(), TIMES)
    assert books(trajectory) == (used + 2 * CHECKPOINT, 0, 2)
    two.sum().backward()
    assert in_all(second) == fewest(2 * CHECKPOINT)
    assert books(trajectory) == (used, 0, 1)
    one.sum().backward()
    assert in_all(first) == 4 + 3
    assert books(trajectory) == (0, 0, 0)
    second(start(), TIMES).sum().backward()
    assert in_all(second) == fewest(ram)


def test_every_solve_gets_its_part_where_several_are_announced() -> None:
    trajectory = Trajectory(ram=6 * CHECKPOINT, solves=2, keep="solution")
    nodes = [node_of(trajectory), node_of(trajectory)]
    losses = [node(start(), TIMES).sum() for node in nodes]
    assert books(trajectory) == (6 * CHECKPOINT, 0, 2)
    for loss in losses:
        loss.backward()
    assert [in_all(node) for node in nodes] == [fewest(3 * CHECKPOINT)] * 2
    assert books(trajectory) == (0, 0, 0)


def test_two_solves_of_one_module_share_as_those_of_two_do() -> None:
    trajectory = Trajectory(ram=6 * CHECKPOINT, solves=2, keep="solution")
    node, u0 = node_of(trajectory), start()
    (node(u0, TIMES) + node(u0, TIMES)).sum().backward()
    assert in_all(node) == fewest(3 * CHECKPOINT)
    assert books(trajectory) == (0, 0, 0)


@pytest.mark.parametrize("keep", ["auto", "stages", "solution"])
@pytest.mark.parametrize("rtol", [None, 1e-5], ids=["steps of fixed size", "error control"])
def test_what_is_held_never_exceeds_the_budget(rtol: float | None, keep: str, tmp_path: Path) -> None:
    ram, disk = 40 * CHECKPOINT, 9 * CHECKPOINT
    trajectory = Trajectory(ram, disk, tmp_path, keep=keep, schedule="multistage", solves=3)
    most: list[tuple[int, int]] = []

    class Looking(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            most.append(books(trajectory)[:2])
            return super().forward(t, u)

    nodes = [NeuralODE(Looking(), method="dopri5", step_size=0.05, rtol=rtol, trajectory=trajectory) for _ in range(3)]
    losses = [node(start(), TIMES).sum() for node in nodes]
    for loss in losses:
        loss.backward()
    assert max(held for held, _ in most) <= ram
    assert max(held for _, held in most) <= disk
    # Not because nothing is booked.
    assert max(held for held, _ in most) >= ram - 3 * CHECKPOINT - 3 * 6 * CHECKPOINT
    assert books(trajectory) == (0, 0, 0)


@pytest.mark.parametrize("keep", ["solution", "stages", "auto", "graph"])
@pytest.mark.parametrize("ram", [2, 4, 9, 40, 80])
def test_the_ledger_holds_every_tape_and_checkpoint_between_the_passes(ram: int, keep: str) -> None:
    trajectory = Trajectory(ram=ram * CHECKPOINT, keep=keep)
    node = node_of(trajectory)
    if keep == "graph" and ram * CHECKPOINT < STEPS * TAPE:
        with pytest.raises(ConfigurationError, match=f"the graphs of 20 steps need ram = {STEPS * TAPE}, more than"):
            node(start(), TIMES)
        return
    loss = node(start(), TIMES).sum()
    solve = node.last_solve
    # The state of the one stage is all that is kept of a step's stages.
    tapes = solve.graph_steps * (CHECKPOINT if keep == "stages" else TAPE)
    assert books(trajectory) == (tapes + solve.checkpoint_bytes_peak, 0, 1)
    assert books(trajectory)[0] <= ram * CHECKPOINT
    loss.backward()
    assert solve.recomputed_steps == node.last_plan.recomputed_steps  # type: ignore[union-attr]


def test_with_error_control_the_ledger_holds_the_tapes_or_the_checkpoints() -> None:
    for ram, keeps_tapes in (("1MiB", True), (20 * CHECKPOINT, False)):
        trajectory = Trajectory(ram=ram)
        node = NeuralODE(Network(), method="heun", rtol=1e-5, trajectory=trajectory)
        loss = node(start(), TIMES).sum()
        solve = node.last_solve
        assert (solve.graph_steps == solve.forward_steps > 20) == keeps_tapes
        held = solve.graph_bytes if keeps_tapes else 20 * CHECKPOINT
        assert books(trajectory) == (held, 0, 1)
        loss.backward()
        assert books(trajectory) == (0, 0, 0)


def test_where_nothing_is_left_one_line_names_what_to_set() -> None:
    trajectory = Trajectory(ram=3 * CHECKPOINT, keep="solution")
    first, second = node_of(trajectory), node_of(trajectory)
    waiting = first(start(), TIMES)
    with pytest.raises(ConfigurationError, match=r"1 other solve\(s\) .* hold all of it: set solves = 2") as caught:
        second(start(), TIMES)
    assert "\n" not in str(caught.value)
    assert books(trajectory) == (3 * CHECKPOINT, 0, 1)
    waiting.sum().backward()
    second(start(), TIMES).sum().backward()
    assert books(trajectory) == (0, 0, 0)


def test_what_the_line_says_helps() -> None:
    trajectory = Trajectory(ram=3 * CHECKPOINT, keep="solution", solves=2)
    losses = [node_of(trajectory)(start(), TIMES).sum() for _ in range(2)]
    assert books(trajectory) == (2 * CHECKPOINT, 0, 2)
    for loss in losses:
        loss.backward()
    assert books(trajectory) == (0, 0, 0)


def test_a_share_too_small_for_one_checkpoint_is_answered_with_a_budget_that_works() -> None:
    with pytest.raises(ConfigurationError, match=f"the smallest that works is ram = {3 * CHECKPOINT}$"):
        node_of(Trajectory(ram=2 * CHECKPOINT, solves=3))(start(), TIMES)
    trajectory = Trajectory(ram=3 * CHECKPOINT, solves=3)
    for loss in [node_of(trajectory)(start(), TIMES).sum() for _ in range(3)]:
        loss.backward()


def test_the_disk_is_shared_too(tmp_path: Path) -> None:
    ram, disk = 2 * CHECKPOINT, 4 * CHECKPOINT
    trajectory = Trajectory(ram, disk, tmp_path, keep="solution", schedule="multistage", solves=2)
    nodes = [node_of(trajectory), node_of(trajectory)]
    losses = [node(start(), TIMES).sum() for node in nodes]
    assert books(trajectory) == (2 * CHECKPOINT, 4 * CHECKPOINT, 2)
    for loss in losses:
        loss.backward()
    assert [in_all(node) for node in nodes] == [fewest(CHECKPOINT, disk=2)] * 2
    assert books(trajectory) == (0, 0, 0)


def test_equal_budgets_that_are_not_one_object_are_not_shared() -> None:
    one, other = (Trajectory(ram=3 * CHECKPOINT, keep="solution") for _ in range(2))
    assert one == other
    node = node_of(one)
    waiting = node(start(), TIMES)
    # The same module, too, must not mistake one for the other.
    node.trajectory = other
    node(start(), TIMES).sum().backward()
    assert in_all(node) == fewest(3 * CHECKPOINT)
    assert (books(one), books(other)) == ((3 * CHECKPOINT, 0, 1), (0, 0, 0))
    waiting.sum().backward()
    assert books(one) == (0, 0, 0)


def test_a_solve_without_gradients_is_charged_nothing_and_runs_where_nothing_is_left() -> None:
    trajectory = Trajectory(ram=3 * CHECKPOINT, keep="solution")
    waiting = node_of(trajectory)(start(), TIMES)
    seen: list[Any] = []

    class Looking(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            seen.append(books(trajectory))
            return super().forward(t, u)

    with torch.no_grad():
        node_of(trajectory, Looking())(start(), TIMES)
    assert set(seen) == {(3 * CHECKPOINT, 0, 1)}
    waiting.sum().backward()
    assert books(trajectory) == (0, 0, 0)


@pytest.mark.parametrize("keep", ["auto", "graph", "stages", "solution"])
def test_two_outstanding_solves_have_the_gradients_of_two_separate_ones(keep: str) -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    alone = node_of(Trajectory("1MiB"), network)
    wanted = gradients(lambda u: alone(alone(u, TIMES)[-1], TIMES), u0, parameters)
    size = "1MiB" if keep == "graph" else 40 * CHECKPOINT
    node = node_of(Trajectory(size, keep=keep, solves=2), network)
    assert identical(gradients(lambda u: node(node(u, TIMES)[-1], TIMES), u0, parameters), wanted)
    assert books(node.trajectory) == (0, 0, 0)  # type: ignore[arg-type]


# Giving back


@pytest.mark.parametrize("rtol", [None, 1e-5], ids=["steps of fixed size", "error control"])
@pytest.mark.parametrize("keep", ["auto", "graph", "stages", "solution"])
def test_a_graph_that_is_dropped_gives_everything_back(keep: str, rtol: float | None) -> None:
    trajectory = Trajectory("1MiB", keep=keep)
    solution = NeuralODE(Network(), method="dopri5", step_size=0.05, rtol=rtol, trajectory=trajectory)(start(), TIMES)
    assert books(trajectory)[0] > 0
    assert books(trajectory)[2] == 1
    del solution
    gc.collect()
    assert books(trajectory) == (0, 0, 0)


@pytest.mark.parametrize("rtol", [None, 1e-5], ids=["steps of fixed size", "error control"])
@pytest.mark.parametrize("calls", [0, 1, 11], ids=["first", "second", "twelfth"])
def test_an_error_of_f_in_the_forward_pass_gives_everything_back(calls: int, rtol: float | None) -> None:
    trajectory = Trajectory(ram=5 * CHECKPOINT, keep="solution")
    node = NeuralODE(Failing(calls), method="heun", step_size=0.05, rtol=rtol, trajectory=trajectory)
    with pytest.raises(OopsError) as caught:
        node(start(), TIMES)
    # At once, though the error keeps everything alive that was under way.
    assert books(trajectory) == (0, 0, 0)
    del caught
    node.func.left.extend(range(10**5))  # type: ignore[union-attr]
    node(start(), TIMES).sum().backward()
    assert books(trajectory) == (0, 0, 0)


@pytest.mark.parametrize("keep", ["stages", "solution"])
def test_an_error_of_f_in_the_backward_pass_gives_everything_back(keep: str) -> None:
    trajectory = Trajectory(ram=5 * CHECKPOINT, keep=keep)
    node = node_of(trajectory, Failing(STEPS + 3))
    loss = node(start(), TIMES).sum()
    with pytest.raises(OopsError) as caught:
        loss.backward()
    assert books(trajectory) == (0, 0, 0)
    del caught
    node.func.left.extend(range(10**5))  # type: ignore[union-attr]
    node(start(), TIMES).sum().backward()
    assert books(trajectory) == (0, 0, 0)


def test_a_second_backward_pass_is_charged_again_and_gives_back_again() -> None:
    trajectory = Trajectory(ram=3 * CHECKPOINT, keep="solution")
    node, u0 = node_of(trajectory), start()
    loss = node(u0, TIMES).square().sum()
    (first,) = torch.autograd.grad(loss, [u0], retain_graph=True)
    assert books(trajectory) == (0, 0, 0)
    (second,) = torch.autograd.grad(loss, [u0], retain_graph=True)
    assert books(trajectory) == (0, 0, 0)
    (third,) = torch.autograd.grad(loss, [u0])
    assert books(trajectory) == (0, 0, 0)
    assert identical([second, third], [first, first])


def test_giving_back_twice_gives_back_once() -> None:
    ledger = Ledger()
    ledger.charge(10, 5)
    refund = ledger.charge(3, 2)
    refund()
    refund()
    assert (ledger.ram, ledger.disk, ledger.solves) == (10, 5, 1)


@pytest.mark.parametrize("rtol", [None, 1e-5], ids=["steps of fixed size", "error control"])
@pytest.mark.parametrize("keep", ["auto", "solution", "graph"])
def test_a_solve_within_f_of_another_finds_room_in_the_budget_of_both(keep: str, rtol: float | None) -> None:
    # With error control the outer solve may need all of its part: it is not known how many steps there will be.
    trajectory = Trajectory("1MiB", keep=keep, solves=1 if rtol is None else 2)
    inner = node_of(trajectory)

    def outer_func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return inner(u, [0.0, 0.1])[-1] - u

    u0 = start()
    outer = NeuralODE(outer_func, params=list(inner.parameters()), step_size=0.1, rtol=rtol, trajectory=trajectory)
    (found,) = torch.autograd.grad(outer(u0, TIMES).sum(), [u0])
    assert books(trajectory) == (0, 0, 0)
    inner.trajectory, outer.trajectory = Trajectory("1MiB"), Trajectory("1MiB", keep="solution")
    (wanted,) = torch.autograd.grad(outer(u0, TIMES).sum(), [u0])
    assert identical([found], [wanted])


# Copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))], ids=["deepcopy", "pickle"]
)
def test_copies_have_a_budget_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    trajectory = Trajectory(ram=3 * CHECKPOINT, keep="solution")
    node = node_of(trajectory)
    waiting = node(start(), TIMES)
    for twin in (duplicate(node), node_of(duplicate(trajectory))):
        assert twin.trajectory == trajectory
        assert twin.trajectory.ledger is not trajectory.ledger
        assert books(twin.trajectory) == (0, 0, 0)
        twin(start(), TIMES).sum().backward()
        assert in_all(twin) == fewest(3 * CHECKPOINT)
        assert books(trajectory) == (3 * CHECKPOINT, 0, 1)
    waiting.sum().backward()
    assert books(trajectory) == (0, 0, 0)


def test_modules_that_are_copied_together_go_on_sharing() -> None:
    trajectory = Trajectory(ram=3 * CHECKPOINT, keep="solution")
    both = copy.deepcopy(torch.nn.ModuleList([node_of(trajectory), node_of(trajectory)]))
    assert both[0].trajectory is both[1].trajectory
    assert both[0].trajectory.ledger is not trajectory.ledger


# Idle memory


def memory_of(node: NeuralODE) -> int:
    """The bytes of all slots in memory that a module has, used or not."""
    pools: list[MemoryPool] = [solver.memory for solver in node._solvers._solvers.values()]
    return sum(contents.nbytes for pool in pools for contents in pool._slots.values())


def test_memory_that_lies_idle_in_one_module_is_freed_when_another_needs_the_budget() -> None:
    trajectory = Trajectory(ram=5 * CHECKPOINT, keep="solution")
    first, second = node_of(trajectory), node_of(trajectory)
    first(start(), TIMES).sum().backward()
    # It stays, to be used again.
    assert memory_of(first) == 5 * CHECKPOINT
    waiting = second(start(), TIMES)
    assert (memory_of(first), memory_of(second)) == (0, 5 * CHECKPOINT)
    waiting.sum().backward()
    first(start(), TIMES).sum().backward()
    assert (memory_of(first), memory_of(second)) == (5 * CHECKPOINT, 0)


def test_memory_in_use_is_not_freed() -> None:
    trajectory = Trajectory(ram=6 * CHECKPOINT, solves=2, keep="solution")
    first, second = node_of(trajectory), node_of(trajectory)
    u0 = start()
    loss = first(u0, TIMES).square().sum()
    held = memory_of(first)
    assert held == 3 * CHECKPOINT
    second(start(), TIMES).sum().backward()
    assert memory_of(first) == held
    wanted = node_of(Trajectory("1MiB"))
    expected = torch.autograd.grad(wanted(u0, TIMES).square().sum(), [u0])
    assert identical(torch.autograd.grad(loss, [u0]), expected)


def test_memory_of_a_module_with_two_alternating_sizes_stays_within_the_budget() -> None:
    trajectory = Trajectory(ram=12 * CHECKPOINT, keep="solution")
    node = node_of(trajectory)
    for samples in (2, 4, 2, 4):
        node(random(samples, 3).requires_grad_(), TIMES).sum().backward()
        assert memory_of(node) <= 12 * CHECKPOINT


def test_a_solve_within_f_has_memory_beside_a_solve_with_error_control() -> None:
    inner = NeuralODE(Network(), step_size=0.5)
    outer = NeuralODE(lambda t, u: inner(u, [0.0, 1.0])[-1] - u, params=list(inner.parameters()), rtol=1e-5)
    u0 = random(2, 3).requires_grad_()
    outer(u0, TIMES).sum().backward()
    assert outer.last_solve.graph_steps == outer.last_solve.forward_steps
    assert books(budget.DEFAULT) == (0, 0, 0)
