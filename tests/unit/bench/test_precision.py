"""The benchmark of precision compares gradients of the same step, and its checks can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pnode_dist.bench import precision as bench

SHORT = replace(bench.PROBLEMS[0], steps=20, rounds=1)


def test_gradients_get_worse_with_fewer_digits_and_stay_gradients() -> None:
    report = bench.measured((12, 16), 1)
    errors = {str(row["f in"]): float(row["gradient error"]) for row in report.rows}
    assert errors["float64"] == 0.0
    assert torch.finfo(torch.float32).eps / 10 < errors["float32"] < 1e-5
    assert 10 * errors["float32"] < errors["bfloat16"] < 5e-2
    assert 0 < errors["all in float32"] < 1e-5
    assert all(float(row["seconds"]) > 0 for row in report.rows)


def test_the_checks_fail_for_what_is_too_slow_or_too_inexact() -> None:
    seconds = {"float64": 8.0, "float32": 1.0, "bfloat16": 2.0, "all in float32": 0.5}
    errors = {"float64": 0.0, "float32": 1e-4, "bfloat16": 1e-3, "all in float32": 1e-4}
    good = bench.report((8, 8), seconds, errors)
    assert [row["times as fast"] for row in good.rows] == [1.0, 8.0, 4.0, 16.0]
    assert all(check.holds for check in good.checks)
    worse = {name: 100 * error for name, error in errors.items()}
    bad = bench.report((8, 8), {**seconds, "float32": 1.01}, worse)
    assert not any(check.holds for check in bad.checks)


def test_a_float64_state_has_a_smaller_error_than_plain_torch_and_a_float32_state() -> None:
    rows, checks = bench.states([SHORT])
    assert [row["solver"] for row in rows] == [bench.PLAIN, bench.NARROW, bench.WIDE]
    plain, narrow, wide = (float(row["gradient error"]) for row in rows)
    eps = torch.finfo(torch.float32).eps
    assert eps / 10 < plain < 1e-5
    assert plain / 4 < narrow < 4 * plain
    assert 0 < wide < narrow / 2
    assert all(float(row["time"]) > 0 for row in rows)
    assert [check.value for check in checks] == [narrow / plain]


def test_the_check_of_a_float32_state_fails_for_a_larger_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict.fromkeys((bench.PLAIN, bench.NARROW, bench.WIDE), 1.0)
    for error, holds in ((1.9e-7, True), (2.1e-7, False)):
        errors = {bench.PLAIN: 1e-7, bench.NARROW: error, bench.WIDE: 1e-8}
        monkeypatch.setattr(bench, "costs_and_errors", lambda problem, errors=errors: (found, errors))
        _, (check,) = bench.states([SHORT])
        assert check.holds is holds


def test_threads_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "POINTS", 8)
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "PROBLEMS", (SHORT,))
    before = torch.get_num_threads()
    assert len(bench.run().rows) == 4
    assert torch.get_num_threads() == before
