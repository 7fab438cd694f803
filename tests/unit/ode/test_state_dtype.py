"""The type of state, adjoint and checkpoints: that of u0 and f for explicit methods, PETSc's for all others."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pnode_dist import ConfigurationError, NeuralODE, Trajectory, odeint
from pnode_dist.config.load import load
from pnode_dist.problems.common.solver import neural_ode
from pnode_dist.torchdiffeq import odeint as odeint_of_torchdiffeq
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES, STEPS = [0.0, 0.5, 1.0], 40
SINGLE, DOUBLE = torch.float32, torch.float64
EPS = torch.finfo(SINGLE).eps
U0 = random(2, 3, dtype=SINGLE)
METHODS = {"rk4": "4", "dopri5": "5dp", "bosh3": "3bs"}
KEPT = {
    "graph": Trajectory("1MiB", keep="graph"),
    "stages": Trajectory("1MiB", keep="stages"),
    "checkpoints": Trajectory(ram_slots=3),
}


def network(dtype: torch.dtype) -> Network:
    return Network(dtype=SINGLE).to(dtype)


def in_double(tensors: Any) -> list[torch.Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def solved(state_dtype: torch.dtype | None, func: Network | None = None, **settings: Any) -> tuple[Any, NeuralODE]:
    node = NeuralODE(func or network(SINGLE), state_dtype=state_dtype, **{"step_size": 1 / STEPS, **settings})
    return gradients(lambda u: node(u, TIMES), U0, list(node.parameters())), node


def plain(dtype: torch.dtype, method: str = "rk4") -> tuple[torch.Tensor, ...]:
    func, table = network(dtype), TABLEAUX[METHODS[method]]
    return gradients(lambda u: odeint_plain(func, u, TIMES, table, 1 / STEPS), U0.to(dtype), list(func.parameters()))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("method", METHODS)
def test_a_float32_state_has_the_rounding_of_plain_torch_in_float32(method: str, kept: str) -> None:
    exact = in_double(plain(DOUBLE, method))
    theirs = distance(in_double(plain(SINGLE, method)), exact)
    found, _ = solved(None, method=method, trajectory=KEPT[kept])
    assert all(part.dtype is SINGLE for part in found)
    assert EPS / 4 < distance(in_double(found), exact) <= 4 * max(theirs, EPS)


@pytest.mark.parametrize("kept", KEPT)
def test_a_float64_state_of_a_float32_function_rounds_its_values_alone(kept: str) -> None:
    exact = in_double(plain(DOUBLE))
    narrow, wide = (distance(in_double(solved(dtype, trajectory=KEPT[kept])[0]), exact) for dtype in (SINGLE, DOUBLE))
    assert 0 < wide <= 2 * EPS
    assert wide < narrow / 2


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_the_gradient_of_a_float32_state_has_the_same_bits_for_every_budget(dtype: torch.dtype) -> None:
    wanted, _ = solved(dtype, trajectory=KEPT["graph"])
    for kept in ("stages", "checkpoints"):
        found, node = solved(dtype, trajectory=KEPT[kept])
        assert identical(found, wanted) if kept == "checkpoints" else distance(found, wanted) <= EPS
        assert node.last_solve.largest_mismatch <= EPS


@pytest.mark.parametrize(
    ("u0", "compute", "given", "expected"),
    [
        (SINGLE, None, None, 4),
        (DOUBLE, None, None, 8),
        (DOUBLE, SINGLE, None, 8),
        (SINGLE, DOUBLE, None, 8),
        (torch.bfloat16, None, None, 4),
        (SINGLE, None, DOUBLE, 8),
        (DOUBLE, None, SINGLE, 4),
        (DOUBLE, SINGLE, SINGLE, 4),
        (torch.bfloat16, None, DOUBLE, 8),
    ],
    ids=str,
)
def test_the_state_has_the_given_type_or_the_wider_one_of_u0_and_f(
    u0: torch.dtype, compute: torch.dtype | None, given: torch.dtype | None, expected: int
) -> None:
    settings: dict[str, Any] = {"compute_dtype": compute, "state_dtype": given}
    node = NeuralODE(network(u0), step_size=1 / STEPS, trajectory=Trajectory(ram_slots=3), **settings)
    start = U0.to(u0).requires_grad_()
    states = node(start, TIMES)
    (gradient,) = torch.autograd.grad(states.square().sum(), start)
    assert node.last_solve.checkpoint_bytes_peak == 3 * U0.numel() * expected
    assert states.dtype is gradient.dtype is u0


def stored_type(path: Path) -> np.dtype[Any]:
    """The type of the checkpoints in a file, once the thread that writes them has created them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with h5py.File(path, "r", locking=False) as file:
            if "state" in file:
                return np.dtype(file["state"].dtype)
        time.sleep(0.01)
    raise TimeoutError(f"{path} holds no checkpoints")


def test_checkpoints_on_disk_have_the_type_and_half_the_bytes(tmp_path: Path) -> None:
    counts = {}
    for dtype in (SINGLE, DOUBLE):
        directory = tmp_path / str(dtype)
        directory.mkdir()
        trajectory = Trajectory(ram_slots=1, disk_slots=3, directory=directory)
        node = NeuralODE(network(SINGLE), step_size=1 / STEPS, trajectory=trajectory, state_dtype=dtype)
        states = node(U0, TIMES)
        (path,) = directory.rglob("*.h5")
        assert stored_type(path) == np.dtype(str(dtype).removeprefix("torch."))
        states.square().sum().backward()
        counts[dtype] = node.last_solve
    half, full = counts[SINGLE], counts[DOUBLE]
    assert full.checkpoint_bytes_peak == 2 * half.checkpoint_bytes_peak == 4 * U0.numel() * 8
    assert full.bytes_written == 2 * half.bytes_written > 0
    assert full.bytes_read == 2 * half.bytes_read > 0


def test_the_same_budget_pays_for_twice_as_many_float32_checkpoints() -> None:
    for dtype, slots in ((DOUBLE, 3), (SINGLE, 6)):
        trajectory = Trajectory(3 * U0.numel() * 8, keep="solution", schedule="revolve")
        _, node = solved(dtype, trajectory=trajectory)
        taken = node.last_solve.forward_steps + node.last_solve.recomputed_steps
        assert taken == fewest_solve_steps(STEPS, slots, 0)
        assert node.plan(U0, TIMES).slots.checkpoint_bytes == U0.numel() * 24 // slots


def test_the_smallest_budget_that_works_is_that_of_one_float32_checkpoint() -> None:
    least = U0.numel() * 4
    with pytest.raises(ConfigurationError, match=f"the smallest that works is ram = {least}$"):
        solved(None, trajectory=Trajectory(least - 1, keep="solution"))
    solved(None, trajectory=Trajectory(least, keep="solution"))


@pytest.mark.parametrize("method", ["cn", "beuler", "arkimex_3", "dirk_es324sal", "bdf", "ssp_rks2"])
def test_methods_with_petsc_s_vectors_refuse_a_float32_state_in_one_line(method: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        odeint(network(SINGLE), U0, TIMES, method=method, step_size=0.1, state_dtype=SINGLE)
    assert str(caught.value) == (
        f"state_dtype = torch.float32: method = '{method}' has its state in PETSc's vectors: must be torch.float64 or "
        "None"
    )
    with torch.no_grad():
        automatic, double = (
            odeint(network(SINGLE), U0, TIMES, method=method, step_size=0.1, state_dtype=dtype)
            for dtype in (None, DOUBLE)
        )
    assert torch.equal(automatic, double)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, "float32", 32, []], ids=str)
def test_an_unknown_type_of_the_state_is_refused(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^state_dtype = .*: must be torch.float32, torch.float64, or None"):
        odeint(network(SINGLE), U0, TIMES, state_dtype=dtype)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_error_control_meets_its_tolerance_with_a_state_of_either_type(dtype: torch.dtype) -> None:
    exact = in_double(plain(DOUBLE, "dopri5"))
    settings: dict[str, Any] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-6, "step_size": None}
    found, node = solved(dtype, trajectory=Trajectory(ram_slots=2), **settings)
    assert node.last_solve.recomputed_steps > 0
    assert 1e-9 < distance(in_double(found), exact) <= 2e-4
    tolerance = torch.full_like(U0, 1e-6)
    entries, _ = solved(dtype, trajectory=Trajectory(ram_slots=2), **{**settings, "atol": tolerance})
    assert distance(in_double(entries), in_double(found)) <= 1e-5


def test_the_interface_of_torchdiffeq_keeps_the_state_in_the_type_of_y0() -> None:
    func = network(SINGLE)
    t = torch.tensor(TIMES)
    for method, options in (("rk4", {"step_size": 1 / STEPS}), ("dopri5", None)):
        start = U0.clone().requires_grad_()
        budget = Trajectory(ram_slots=2)
        states = odeint_of_torchdiffeq(func, start, t, method=method, options=options, trajectory=budget)
        assert states.dtype is SINGLE
        assert budget.ledger.solves == 1
        pools = [pool for pool in budget.ledger.pools if pool._slots]  # type: ignore[attr-defined]
        assert {slot.dtype for pool in pools for slot in pool._slots.values()} == {np.dtype("float32")}
        states.sum().backward()


def test_petsc_s_monitors_get_a_float32_state(tmp_path: Path) -> None:
    file = tmp_path / "states"
    options = {"ts_monitor_solution": f"ascii:{file}"}
    states = odeint(network(SINGLE), U0, [0.0, 0.1], step_size=0.1, options=options)
    # PETSc prints a heading, the name of the process, and one entry on each line.
    shown = [float(line) for line in re.findall(r"^-?\d\S*$", file.read_text(), re.MULTILINE)]
    assert shown == pytest.approx(states.detach().flatten().double().tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_tangents_and_second_derivatives_follow_the_type_of_the_state(dtype: torch.dtype) -> None:
    along = random(2, 3, seed=4, dtype=SINGLE)
    found = {}
    for kind in (SINGLE, DOUBLE):
        func = network(kind)
        node = NeuralODE(func, step_size=0.05, state_dtype=dtype if kind is SINGLE else None)
        start = U0.to(kind).requires_grad_()
        states, tangents = node.jvp(start, TIMES, along.to(kind))
        (first,) = torch.autograd.grad(node(start, TIMES).square().sum(), start, create_graph=True)
        (second,) = torch.autograd.grad((first * along.to(kind)).sum(), start)
        assert states.dtype is tangents.dtype is first.dtype is second.dtype is kind
        found[kind] = in_double((states, tangents, first, second))
    assert 0 < distance(found[SINGLE], found[DOUBLE]) <= 1e-5


def test_gradients_of_float64_parameters_of_a_float32_state_are_summed_in_float64() -> None:
    rate = torch.ones(1, dtype=DOUBLE, requires_grad=True)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return rate.float() * torch.ones_like(u)

    odeint(func, torch.zeros(1), [0.0, 1.0], method="euler", step_size=1e-3)[-1].backward()
    assert rate.grad is not None
    assert rate.grad.dtype is DOUBLE
    # Each of the thousand terms has been rounded to float32, and their sum has not.
    assert abs(rate.grad.item() - 1000 * torch.tensor(1e-3).item()) <= 1e-12


def test_gradients_of_times_are_those_of_plain_torch_up_to_rounding() -> None:
    found = {}
    for dtype in (SINGLE, DOUBLE):
        t = torch.tensor(TIMES, dtype=DOUBLE, requires_grad=True)
        states = odeint(network(dtype), U0.to(dtype), t, step_size=1 / STEPS)
        (found[dtype],) = torch.autograd.grad(states[-1].double().square().sum(), t)
    assert 0 < distance(found[SINGLE], found[DOUBLE]) <= 1e-5


def test_a_module_with_another_type_of_state_takes_another_solver() -> None:
    node = NeuralODE(network(SINGLE), step_size=1 / STEPS)
    before = node(U0, TIMES)
    node.state_dtype = DOUBLE
    after = node(U0, TIMES)
    node.state_dtype = SINGLE
    assert torch.equal(node(U0, TIMES), before)
    assert 0 < distance(after, before) <= 1e-5


def test_the_key_of_the_configuration_reaches_the_solve(config_file: Path) -> None:
    for name, dtype in (("auto", None), ("float32", SINGLE), ("float64", DOUBLE)):
        config = load(config_file, [f"solver.state_dtype={name}"])
        assert neural_ode(config, network(SINGLE), None).state_dtype is dtype
    assert load(config_file).solver.state_dtype == "auto"


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["solver.state_dtype=float16"], r"\[solver\] state_dtype"),
        (
            ["solver.method=cn", "solver.state_dtype=float32"],
            r'\[solver\] state_dtype = "float32": must be "auto" or "float64" with method = "cn", whose state is in',
        ),
    ],
)
def test_a_type_that_the_configured_method_cannot_have_is_one_line(
    config_file: Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        load(config_file, overrides)
    assert "\n" not in str(caught.value)
