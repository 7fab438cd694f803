"""The benchmark of semi-implicit steps compares like with like, and its checks can fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pnode_dist import NeuralODE
from pnode_dist.bench import semi_implicit as bench
from pnode_dist.ode.methods import resolve
from pnode_dist.problems.semilinear.config import LineEquation
from pnode_dist.problems.semilinear.stable_step import TOLERANCE

POINTS, LENGTH = 32, 22.0


@pytest.fixture(scope="module")
def subject() -> bench.Subject:
    return bench.subject(LineEquation("short", LENGTH, -1.0, -1.0, 3), POINTS, spin_up=2.0)


def measured(name: str, step: float, evaluations: float, error: float) -> bench.Measured:
    return bench.Measured(resolve(name), step, evaluations, error)


def test_the_step_of_an_explicit_method_is_the_largest_by_linear_theory(
    subject: bench.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few steps do not show yet that one a few hundredths too long is not stable.
    monkeypatch.setattr("pnode_dist.problems.semilinear.stable_step.STEPS", 60)
    found = bench.measure(subject, "rk4")
    # Where the stability region leaves the negative real axis, over the eigenvalue of the shortest wave.
    spacing = LENGTH / POINTS
    expected = 2.7853 / (16 / spacing**4 - 4 / spacing**2)
    assert expected * (1 - 2 * TOLERANCE) < found.step < 1.04 * expected
    assert found.evaluations == 4 / found.step


def test_the_error_of_semi_implicit_steps_falls_with_their_size(subject: bench.Subject) -> None:
    coarse, fine = (bench.measure(subject, "arkimex_3", step) for step in (0.25, 0.125))
    assert 1e-6 < fine.error < 0.3 * coarse.error
    assert (coarse.step, coarse.evaluations) == (0.25, 16.0)


def test_the_windows_are_all_of_the_trajectory(subject: bench.Subject) -> None:
    batches = subject.batches(torch.float64)
    assert [len(batch.starts) for batch in batches] == [8, 8]
    assert {start for batch in batches for start in batch.starts} == {(0, first) for first in range(16)}


def test_an_epoch_is_the_same_loss_for_every_method(subject: bench.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, list[float]] = {}
    original = NeuralODE.forward

    def recorded(self: NeuralODE, *args: object) -> torch.Tensor:
        states: torch.Tensor = original(self, *args)  # type: ignore[call-overload]
        losses.setdefault(str(self.method), []).append(float(states[-1].detach().square().mean()))
        return states

    monkeypatch.setattr(NeuralODE, "forward", recorded)
    monkeypatch.setattr(bench, "_REPEATS", 1)
    methods = [measured("arkimex_3", 0.125, 1.0, 0.0), measured("rk4", 0.04, 1.0, 0.0)]
    seconds = bench.epochs(subject, methods)
    assert seconds.keys() == {"arkimex_3", "rk4"}
    assert all(value > 0 for value in seconds.values())
    np.testing.assert_allclose(losses["arkimex_3"], losses["rk4"], rtol=1e-3)


def test_the_rival_has_the_fewest_evaluations_of_those_that_are_as_exact() -> None:
    exact, cheap = measured("rk4", 0.2, 400, 1e-6), measured("euler", 0.2, 300, 1e-2)
    slow = measured("heun", 0.2, 500, 1e-6)
    assert bench.best([slow, cheap, exact], 1e-3) == exact
    assert bench.best([slow, cheap, exact], 1e-1) == cheap
    assert bench.best([slow, cheap, exact], 1e-9) == cheap


def test_the_checks_fail_for_steps_too_small_errors_too_large_and_epochs_too_long() -> None:
    own = [measured("arkimex_3", 0.2, 20, 2e-3), measured("arkimex_4", 0.2, 30, 1e-4)]
    rival, other = measured("euler", 0.01, 100, 1e-4), measured("rk4", 0.015, 400, 1e-8)
    good = bench.checks(own, [rival, other], rival, {"arkimex_3": 1.0, "arkimex_4": 1.5, "euler": 2.0})
    assert [check.value for check in good] == pytest.approx([0.075, 0.5, 0.75, 1.0])
    assert all(check.holds for check in good)
    worse, longer = [dataclasses.replace(one, error=0.5) for one in own], dataclasses.replace(other, step=0.03)
    bad = bench.checks(worse, [rival, longer], rival, {"arkimex_3": 3.0, "arkimex_4": 3.0, "euler": 2.0})
    assert not any(check.holds for check in bad)
