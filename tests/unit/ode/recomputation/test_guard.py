"""Recomputed steps are compared with the forward pass: what differs is reported, and what is rounding is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pnode_dist import ConfigurationError, NeuralODE, RecomputationError, Trajectory
from pnode_dist.ode.recomputation.fingerprint import fingerprint, magnitude
from tests.oracles.right_hand_sides import random

INTERVAL = [0.0, 1.0]
METHODS = pytest.mark.parametrize(
    "method", ["euler", "rk4", "dopri5", "beuler", "cn", "theta", "arkimex_3", "dirk_s212", "radau3"]
)


def solver(array: np.ndarray[Any, Any], **settings: Any) -> tuple[NeuralODE, torch.Tensor]:
    """du/dt = -w a u with an array a that can be changed in place."""
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -w * u * torch.tensor(array)

    return NeuralODE(func, step_size=0.1, params=[w], **settings), w


def gradient_after(solve: NeuralODE, w: torch.Tensor, change: Callable[[], object]) -> torch.Tensor:
    end = solve(torch.ones(3, dtype=torch.float64), INTERVAL)[-1]
    change()
    return torch.autograd.grad(end.sum(), w)[0]


@METHODS
@pytest.mark.parametrize("keep", ["solution", "stages"])
def test_an_array_changed_in_place_is_reported_with_step_size_and_reasons(method: str, keep: str) -> None:
    array = np.ones(3)
    solve, w = solver(array, method=method, trajectory=Trajectory(ram="1MiB", keep=keep))
    with pytest.raises(RecomputationError, match=r"(step 8 from t = 0.8|func at t = \S+), recomputed .* differs .* by"):
        gradient_after(solve, w, lambda: array.fill(1.0001))


def test_a_difference_in_one_entry_of_many_is_seen() -> None:
    array = np.ones(3)
    solve, w = solver(array, trajectory=Trajectory(ram="1MiB", keep="solution"))
    with pytest.raises(RecomputationError):
        gradient_after(solve, w, lambda: array.__setitem__(1, 1 + 1e-9))


def test_warn_goes_on_and_ignore_says_nothing() -> None:
    array = np.ones(3)
    settings: dict[str, Any] = {"trajectory": Trajectory(ram="1MiB", keep="solution")}
    solve, w = solver(array, on_mismatch="warn", **settings)
    with pytest.warns(RuntimeWarning, match="recomputed for the gradient"):
        gradient_after(solve, w, lambda: array.fill(2.0))
    assert 0.05 < solve.last_solve.largest_mismatch < 0.2
    array.fill(1.0)
    solve, w = solver(array, on_mismatch="ignore", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_after(solve, w, lambda: array.fill(2.0))


def test_differences_of_the_size_of_rounding_pass() -> None:
    array = np.ones(3)
    solve, w = solver(array, trajectory=Trajectory(ram="1MiB", keep="solution"))
    gradient_after(solve, w, lambda: array.fill(1 + 4e-13))
    assert 0 < solve.last_solve.largest_mismatch < 1e-13


@METHODS
def test_pure_functions_differ_by_nothing_under_any_budget(method: str) -> None:
    for settings in ({"keep": "solution"}, {"keep": "stages"}, {"ram_slots": 2}):
        solve, w = solver(np.ones(3), method=method, trajectory=Trajectory(ram="1MiB", **settings))  # type: ignore[arg-type]
        gradient_after(solve, w, lambda: None)
        assert solve.last_solve.largest_mismatch == 0.0


def test_rounded_checkpoints_are_no_mismatch() -> None:
    trajectory = Trajectory(ram="1MiB", keep="solution", checkpoint_dtype="float32")
    solve, w = solver(np.full(3, 0.3), trajectory=trajectory)
    gradient_after(solve, w, lambda: None)
    assert 0 < solve.last_solve.largest_mismatch < 1e-6


def test_adaptive_steps_that_are_recomputed_are_compared() -> None:
    array = np.ones(3)
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    solve = NeuralODE(
        lambda t, u: -w * u * torch.tensor(array),
        rtol=1e-8,
        params=[w],
        trajectory=Trajectory(ram="1MiB", keep="solution"),
    )
    gradient_after(solve, w, lambda: None)
    assert solve.last_solve.recomputed_steps > 3
    assert solve.last_solve.largest_mismatch == 0.0
    with pytest.raises(RecomputationError, match="step"):
        gradient_after(solve, w, lambda: array.fill(2.0))


def test_a_tensor_changed_in_place_is_named_among_the_reasons() -> None:
    large = torch.ones(20_000, dtype=torch.float64)
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    solve = NeuralODE(
        lambda t, u: -w * u * large, step_size=0.1, params=[w], trajectory=Trajectory(ram="8MiB", keep="solution")
    )
    end = solve(torch.ones(20_000, dtype=torch.float64), INTERVAL)[-1]
    with torch.no_grad():
        # A view with a version of its own: autograd sees nothing of it.
        torch.from_numpy(large.numpy()).fill_(2.0)
    with pytest.raises(RecomputationError):
        torch.autograd.grad(end.sum(), w)


def test_an_unknown_policy_is_refused() -> None:
    solve, w = solver(np.ones(3), on_mismatch="shout")
    with pytest.raises(ConfigurationError, match="on_mismatch = 'shout': must be one of raise, warn, ignore"):
        gradient_after(solve, w, lambda: None)


@pytest.mark.parametrize("size", [0, 1, 5, 256, 257, 4096, 4097, 20_000, 3 * 4096])
def test_a_fingerprint_sees_every_entry_and_their_order(size: int) -> None:
    values = random(max(size, 1))[:size]
    base = fingerprint([values])
    assert abs(base) <= 2 * magnitude([values]) * max(size, 1) ** 0.5
    for entry in {0, size // 2, size - 1} if size else ():
        other = values.clone()
        other[entry] += 1e-6
        assert 0.4e-6 < fingerprint([other]) - base < 1.6e-6
    if size > 1:
        assert fingerprint([values.roll(1)]) != base
        assert fingerprint([values[: size // 2], values[size // 2 :]]) != fingerprint(
            [values[size // 2 :], values[: size // 2]]
        )


def in_order(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The sums over the last axis as a BLAS without blocks forms them: entry after entry."""
    found: np.ndarray[Any, Any] = np.cumsum(left * right, axis=-1)[..., -1]
    return found


@pytest.mark.parametrize("size", [255, 4096, 2**17])
def test_a_fingerprint_is_linear_to_rounding_with_a_blas_that_sums_in_order(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "vdot", lambda left, right: in_order(left.ravel(), right.ravel()))
    monkeypatch.setattr(torch, "mv", lambda rows, row: torch.from_numpy(in_order(rows.numpy(), row.numpy())))
    # Of a constant one, the errors of the sums do not cancel.
    state, slope = torch.ones(size, dtype=torch.float64), torch.full((size,), -0.5, dtype=torch.float64)
    whole = fingerprint([state + 0.01 * slope])
    assert abs(fingerprint([state]) + 0.01 * fingerprint([slope]) - whole) <= 5e-15 * whole


def test_a_fingerprint_of_not_a_number_equals_itself_for_the_guard() -> None:
    array = np.full(3, np.nan)
    solve, w = solver(array, trajectory=Trajectory(ram="1MiB", keep="solution"))
    gradient_after(solve, w, lambda: None)
    assert solve.last_solve.largest_mismatch == 0.0
