"""Ranks that call different solves, or make them in another order, raise the same error; and go on together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn

from pnode_dist import (
    BatchPartition,
    ConfigurationError,
    DensePartition,
    DisagreementError,
    Mesh,
    NeuralODE,
    Trajectory,
    odeint,
)
from pnode_dist.distributed import agreement
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

pytestmark = pytest.mark.mpi

D = torch.float64
TIMES = [0.0, 0.3, 0.7]
SAMPLES = 4


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """du/dt = -u cos(t)."""
    return -u * torch.cos(t)


def spread(mesh: Mesh) -> BatchPartition:
    return BatchPartition(mesh, SAMPLES * mesh.size, (3,))


def initial(gradient: bool = False) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, 3 * SAMPLES, dtype=D).reshape(SAMPLES, 3).requires_grad_(gradient)


def raised_on_all(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The text of the error of this kind that `action` raises on every rank, the same on all of them."""
    with pytest.raises(kind) as error:
        action()
    texts = MPI.COMM_WORLD.allgather((type(error.value).__name__, str(error.value)))
    assert len(set(texts)) == 1, texts
    assert "\n" not in texts[0][1]
    return texts[0][1]


def assert_solves_right(mesh: Mesh, partition: BatchPartition | None = None) -> None:
    """A solve and its gradient are those of plain torch: the ranks are in step."""
    partition = partition or spread(mesh)
    u0, plain = initial(True), initial(True)
    odeint(decay, u0, TIMES, partition=partition)[-1].square().sum().backward()
    odeint_plain(decay, plain, TIMES, TABLEAUX["4"])[-1].square().sum().backward()
    assert u0.grad is not None
    assert plain.grad is not None
    assert (u0.grad - plain.grad).abs().max() <= 1e-12


DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "method": ({"method": "dopri5"}, {}, "method: rank 0: dopri5; {others}: rk4"),
    "implicit method": ({"method": "cn"}, {}, "method: rank 0: cn; {others}: rk4"),
    "number of times": ({"t": [0.0, 0.3]}, {}, "length of t: rank 0: 2; {others}: 3"),
    "times": ({"t": [0.0, 0.4, 0.7]}, {}, "t[1]: rank 0: 0.4; {others}: 0.3"),
    "leading shape": ({"u0": initial().expand(2, -1, -1)}, {}, "state: rank 0: [2, 4, 3]; {others}: [4, 3]"),
    "shape": ({"u0": initial()[:3]}, {}, "state: rank 0: [3, 3]; {others}: [4, 3]"),
    "number of parts": ({"u0": (initial(),) * 2, "func": lambda t, u: u}, {}, "state: rank 0: [4, 3], [4, 3]; "),
    "dtype": ({"u0": initial().float()}, {}, "dtype: rank 0: torch.float32; {others}: torch.float64"),
    "compute_dtype": ({"compute_dtype": torch.float32}, {}, "compute_dtype: rank 0: torch.float32; {others}: None"),
    "state_dtype": (
        {"state_dtype": torch.float32},
        {},
        "state_dtype: rank 0: torch.float32; {others}: torch.float64",
    ),
    "step_size": ({"step_size": 0.1}, {"step_size": 0.05}, "step_size: rank 0: 0.1; {others}: 0.05"),
    "tolerances": ({"rtol": 1e-4}, {"rtol": 1e-5}, "rtol: rank 0: 0.0001; {others}: 1e-05"),
    "error control": ({"method": "dopri5"}, {"rtol": 1e-5}, "rtol: rank 0: None; {others}: 1e-05"),
    "first_step": ({"rtol": 1e-3, "first_step": 0.1}, {"rtol": 1e-3}, "first_step: rank 0: 0.1; {others}: None"),
    "max_steps": ({"max_steps": 7}, {"max_steps": 8}, "max_steps: rank 0: 7; {others}: 8"),
    "adaptor": ({"atol": 1e-3, "adaptor": "dsp"}, {"atol": 1e-3}, "adaptor: rank 0: dsp; {others}: basic"),
    "options": (
        {"method": "cn", "options": {"snes_rtol": 1e-9}},
        {"method": "cn"},
        "options: rank 0: snes_rtol = 1e-09; {others}: none",
    ),
    "last_only": ({"last_only": True}, {}, "outputs: rank 0: last; {others}: times"),
    "keep": (
        {"u0": initial(True), "trajectory": Trajectory(ram="1MiB", keep="solution")},
        {"u0": initial(True), "trajectory": Trajectory(ram="1MiB", keep="stages")},
        "trajectory: keep: rank 0: solution; {others}: stages",
    ),
    "ram_slots": (
        {"u0": initial(True), "trajectory": Trajectory(ram_slots=1)},
        {"u0": initial(True), "trajectory": Trajectory(ram_slots=2)},
        "trajectory: ram_slots: rank 0: 1; {others}: 2",
    ),
    "gradient": ({"u0": initial(True)}, {}, "only some ranks need a gradient of this solve"),
    "gradient of t": (
        {"u0": initial(True), "t": torch.tensor(TIMES, dtype=D, requires_grad=True)},
        {"u0": initial(True), "t": torch.tensor(TIMES, dtype=D)},
        "gradient with respect to t: rank 0: True; {others}: False",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_ranks_that_differ_in_a_setting_all_raise_which_and_go_on(case: str, mesh: Mesh) -> None:
    of_first, of_others, wanted = DIFFERENCES[case]
    partition = spread(mesh)

    def solve() -> None:
        chosen = {"func": decay, "u0": initial(), "t": TIMES, **(of_first if mesh.rank == 0 else of_others)}
        odeint(chosen.pop("func"), chosen.pop("u0"), chosen.pop("t"), partition=partition, **chosen)

    if mesh.size == 1:
        solve()
        return
    others = agreement.ranks_in_words(range(1, mesh.size))
    text = raised_on_all(DisagreementError, solve)
    assert "the ranks differ in " in text
    assert wanted.format(others=others) in text
    assert "test_agreement.py:" in text
    assert_solves_right(mesh, partition)


def test_ranks_of_which_one_compiles_all_raise_and_go_on(mesh: Mesh) -> None:
    if mesh.size == 1:
        pytest.skip("one rank has nothing to differ from")
    partition = spread(mesh)
    node = NeuralODE(decay, partition=partition, compile="aot_eager" if mesh.rank == 0 else False)
    text = raised_on_all(DisagreementError, lambda: node(initial(), TIMES))
    others = agreement.ranks_in_words(range(1, mesh.size))
    assert f"compile: rank 0: aot_eager; {others}: False" in text
    assert_solves_right(mesh, partition)


def test_one_rank_without_grad_mode_is_an_error_on_all(mesh: Mesh) -> None:
    partition = spread(mesh)

    def solve() -> None:
        with torch.set_grad_enabled(mesh.rank != mesh.size - 1):
            odeint(decay, initial(True), TIMES, partition=partition)

    if mesh.size == 1:
        solve()
        return
    assert "only some ranks need a gradient" in raised_on_all(DisagreementError, solve)


FAILURES: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "method": (ConfigurationError, {"method": "rk5"}, "method = 'rk5'"),
    "step_size": (ValueError, {"step_size": -0.1}, "step_size = -0.1: must be positive"),
    "times": (ValueError, {"t": [0.0, 0.3, 0.2]}, "t must increase or decrease strictly"),
    "state": (TypeError, {"u0": torch.ones(4, 3, dtype=torch.int64)}, "u0 must have one floating-point type"),
    "func": (TypeError, {"func": 3}, "func must be callable"),
    "rtol": (ConfigurationError, {"rtol": -1.0}, "rtol = -1.0: must be positive"),
    "shape of rtol": (ConfigurationError, {"rtol": torch.ones(5, dtype=D)}, "rtol: shape (5,) does not broadcast"),
    "mass": (ConfigurationError, {"method": "cn", "mass": torch.ones(7, dtype=D)}, "mass: shape (7,)"),
    "preconditioner": (ConfigurationError, {"preconditioner": "block"}, "preconditioner: method = 'rk4' is explicit"),
    "another type": (DisagreementError, {"t": 3.0}, "'float' object is not iterable"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_is_wrong_on_one_rank_alone_all_ranks_raise(case: str, mesh: Mesh) -> None:
    kind, settings, wanted = FAILURES[case]
    kind = TypeError if case == "another type" else kind
    partition, last = spread(mesh), mesh.size - 1

    def solve() -> None:
        chosen = {"func": decay, "u0": initial(), "t": TIMES, **(settings if mesh.rank == last else {})}
        odeint(chosen.pop("func"), chosen.pop("u0"), chosen.pop("t"), partition=partition, **chosen)

    text = raised_on_all(kind, solve)
    assert wanted in text
    assert text.startswith(f"rank {last} of {mesh.size}: ") == (mesh.size > 1)
    assert_solves_right(mesh, partition)


def test_an_error_of_an_unknown_type_on_one_rank_is_raised_on_all(mesh: Mesh) -> None:
    class OddError(Exception):
        pass

    class Times(list[float]):
        def __iter__(self) -> Any:
            raise OddError("no times today")

    times = Times() if mesh.rank == 0 else TIMES
    kind: type[Exception] = OddError if mesh.size == 1 else DisagreementError
    text = raised_on_all(kind, lambda: odeint(decay, initial(), times, partition=spread(mesh)))
    assert "no times today" in text


def test_what_is_wrong_on_all_ranks_alike_is_raised_as_on_one(mesh: Mesh) -> None:
    text = raised_on_all(ValueError, lambda: odeint(decay, initial(), TIMES, step_size=-1.0, partition=spread(mesh)))
    assert text.startswith("step_size = -1.0: must be positive")
    assert_solves_right(mesh)


def test_a_tangent_that_is_wrong_on_one_rank_is_raised_on_all(mesh: Mesh) -> None:
    node = NeuralODE(decay, partition=spread(mesh))
    tangent = torch.ones(5 if mesh.rank == 0 else SAMPLES, 3, dtype=D)
    text = raised_on_all(ConfigurationError, lambda: node.jvp(initial(), TIMES, tangent))
    assert "u0_tangent: shapes ((5, 3),)" in text
    values, rates = node.jvp(initial(True), TIMES, initial())
    assert (values - rates).abs().max() <= 1e-12  # The equation is linear.


def test_a_backward_pass_beside_another_solve_is_an_error_on_all_ranks(mesh: Mesh) -> None:
    partition = spread(mesh)
    u0 = initial(True)
    solution = odeint(decay, u0, TIMES, partition=partition)

    def differ() -> None:
        if mesh.rank == 0:
            solution.sum().backward(retain_graph=True)
        else:
            odeint(decay, u0, TIMES, partition=partition)

    if mesh.size > 1:
        text = raised_on_all(DisagreementError, differ)
        assert "the ranks do not make the same call: rank 0: the backward pass of solve " in text
        assert "method rk4, 3 times, state [4, 3] float64; test_agreement.py:" in text
    assert_solves_right(mesh, partition)
    # Nothing was lost of the solve whose backward pass did not begin.
    plain = initial(True)
    odeint_plain(decay, plain, TIMES, TABLEAUX["4"]).sum().backward()
    u0.grad = None
    solution.sum().backward()
    assert u0.grad is not None
    assert plain.grad is not None
    assert (u0.grad - plain.grad).abs().max() <= 1e-12


def test_backward_passes_in_another_order_are_an_error_on_all_ranks(mesh: Mesh) -> None:
    partition = spread(mesh)
    first, second = (odeint(decay, initial(True), TIMES, partition=partition) for _ in range(2))
    solutions = (first, second) if mesh.rank == 0 or mesh.size == 1 else (second, first)

    def reverse() -> None:
        for solution in solutions:
            solution.sum().backward()

    if mesh.size == 1:
        reverse()
        return
    assert "do not make the same call: rank 0: the backward pass" in raised_on_all(DisagreementError, reverse)
    assert_solves_right(mesh, partition)


def test_a_plan_beside_a_solve_is_an_error_on_all_ranks(mesh: Mesh) -> None:
    node = NeuralODE(decay, partition=spread(mesh))
    call = node.plan if mesh.rank == 0 else node.forward
    if mesh.size == 1:
        call(initial(), TIMES)
        return
    assert "do not make the same call: rank 0: plan " in raised_on_all(
        DisagreementError, lambda: call(initial(), TIMES)
    )
    assert node.plan(initial(), TIMES).chosen.steps == 2


def test_solves_inside_of_f_and_their_gradients_agree(mesh: Mesh) -> None:
    partition = spread(mesh)
    inner = NeuralODE(decay, partition=partition, step_size=0.5)

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = -inner(u, [0.0, 1.0])[-1]
        return result

    def plain(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -odeint_plain(decay, u, [0.0, 1.0], TABLEAUX["4"], 0.5)[-1]

    u0, other = initial(True), initial(True)
    odeint(f, u0, TIMES, partition=partition).sum().backward()
    odeint_plain(plain, other, TIMES, TABLEAUX["4"]).sum().backward()
    assert u0.grad is not None
    assert other.grad is not None
    assert (u0.grad - other.grad).abs().max() <= 1e-12


def test_uneven_parts_and_what_only_some_ranks_have_belong_to_one_state(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 2 * mesh.size + 1)
    here = partition.local_shape[0]
    # The other parts fit the partition on the first rank alone, and by chance on none or all of them.
    state = (
        torch.ones(2, here, dtype=D),
        torch.ones(3, dtype=D),
        torch.ones(mesh.rank, dtype=D),
        torch.ones(here, 2, dtype=D),
    )
    found = odeint(lambda t, u: tuple(-part for part in u), state, TIMES, partition=partition)
    plain = odeint_plain(lambda t, u: -u, torch.ones(1, dtype=D), TIMES, TABLEAUX["4"])
    for part, start in zip(found, state, strict=True):
        assert part.shape == (3, *start.shape)
        assert torch.allclose(part, plain.view(3, *(1,) * start.dim()).expand_as(part), rtol=1e-14, atol=0)


def test_budgets_in_bytes_may_differ_and_the_least_counts(mesh: Mesh) -> None:
    u0, plain = initial(True), initial(True)
    trajectory = Trajectory(ram=f"{1 + mesh.rank}MiB", keep="solution")
    odeint(decay, u0, TIMES, partition=spread(mesh), trajectory=trajectory).sum().backward()
    odeint_plain(decay, plain, TIMES, TABLEAUX["4"]).sum().backward()
    assert u0.grad is not None
    assert plain.grad is not None
    assert (u0.grad - plain.grad).abs().max() <= 1e-12


@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_a_solver_that_one_rank_has_to_make_anew_all_ranks_make(method: str, mesh: Mesh) -> None:
    network = nn.Linear(3, 3, dtype=D)
    node = NeuralODE(lambda t, u: torch.tanh(network(u)), method=method, partition=spread(mesh), params=())
    solvers = node._solvers
    found = []
    for frozen in (False, True, False):
        # Its number of parameters is another one on the last rank.
        network.bias.requires_grad_(not (frozen and mesh.rank == mesh.size - 1))
        node(initial(), TIMES).sum().backward()
        found.append(network.weight.grad.clone())
        network.zero_grad()
    assert (found[1] - found[0]).abs().max() <= 1e-12
    assert (found[2] - found[0]).abs().max() <= 1e-12
    assert len(set(MPI.COMM_WORLD.allgather(len(solvers._solvers)))) <= 2


def test_different_operations_of_a_process_group_are_an_error_on_all_ranks(mesh: Mesh) -> None:
    def operate() -> None:
        values = torch.ones(4 + mesh.rank % 2, dtype=D)
        dist.all_reduce(values, group=mesh.world_group)

    def mix() -> None:
        values = torch.ones(4, dtype=D)
        if mesh.rank == 0:
            dist.broadcast(values, 0, group=mesh.world_group)
        else:
            dist.all_reduce(values, group=mesh.world_group)

    if mesh.size > 1:
        text = raised_on_all(DisagreementError, operate)
        assert "the ranks differ in numbers: " in text
        assert ": 4; rank" in text
        text = raised_on_all(DisagreementError, mix)
        assert "the ranks differ in kind: rank 0: broadcast; " in text
        assert ": all_reduce" in text
    total = torch.ones(3)
    dist.all_reduce(total, group=mesh.world_group)
    assert total.tolist() == [mesh.size] * 3


def test_an_agreement_ends_with_its_communicator(comm: MPI.Comm) -> None:
    # There are 2048 communicators at a time in MPICH.
    for _ in range(1500):
        copy = comm.Dup()
        agreed = agreement.of(copy)
        assert agreed is agreement.of(copy)
        agreed.reduced(copy, 7, lambda: agreement.Description("nothing"))
        copy.Free()
        assert agreed.private is None


def test_a_copy_of_a_communicator_has_an_agreement_of_its_own(comm: MPI.Comm) -> None:
    agreed = agreement.of(comm)
    agreed.reduced(comm, 7, lambda: agreement.Description("nothing"))
    copy = comm.Dup()
    assert agreement.of(copy) is not agreed
    assert agreement.of(copy).private is None
    copy.Free()


def test_the_least_of_every_number_is_returned(comm: MPI.Comm) -> None:
    numbers = (comm.rank, -comm.rank, 5)
    least = agreement.of(comm).reduced(comm, 7, lambda: agreement.Description("nothing"), numbers)
    assert least == [0, 1 - comm.size, 5]
