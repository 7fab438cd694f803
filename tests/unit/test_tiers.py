"""What is left out of a run of the tests is known, and can be asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT

TESTS = """
import pytest

@pytest.mark.nightly
def test_long():
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.parametrize("number", range(5))
def test_of_five_cases(number):
    pass

@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_with_one_case_at_night(number):
    assert number >= 0
"""
CASES = [f"test_of_five_cases[{number}]" for number in range(5)]
NORMAL = {"test_slow", *CASES, "test_with_one_case_at_night[0]"}
NIGHTLY = NORMAL | {"test_long", "test_with_one_case_at_night[1]"}


def run(directory: Path, *arguments: str) -> tuple[set[str], str]:
    """The tests that pytest runs, and what it prints."""
    (directory / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.tiers", "-p", "no:cacheprovider", "-v", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return set(re.findall(r"::(\S+) PASSED", done.stdout)), done.stdout + done.stderr


def test_nightly_tests_are_left_out_and_counted_unless_they_are_asked_for(tmp_path: Path) -> None:
    found, said = run(tmp_path)
    assert found == NORMAL
    assert "left out: 2 nightly tests, which --nightly runs\n" in said
    found, said = run(tmp_path, "--nightly")
    assert found == NIGHTLY
    assert "left out" not in said
    assert run(tmp_path, "-m", "nightly")[0] == NIGHTLY - NORMAL


@pytest.mark.parametrize(
    ("named", "runs"),
    [
        ("test_long", {"test_long"}),
        ("test_with_one_case_at_night[1]", {"test_with_one_case_at_night[1]"}),
        ("test_with_one_case_at_night", NIGHTLY - {"test_long", "test_slow", *CASES}),
    ],
)
def test_a_test_that_is_named_runs(named: str, runs: set[str], tmp_path: Path) -> None:
    assert run(tmp_path, f"test_some.py::{named}")[0] == runs


def test_what_is_left_out_is_counted_where_processes_share_the_tests_too(tmp_path: Path) -> None:
    _, said = run(tmp_path, "-n", "2")
    assert "left out: 2 nightly tests, which --nightly runs\n" in said


def test_some_cases_are_four_of_each_test_at_equal_distances(tmp_path: Path) -> None:
    found, said = run(tmp_path, "--some-cases")
    assert found == NORMAL - {CASES[2]}
    assert "left out: 1 further cases, which run without --some-cases\n" in said


def test_the_quick_tier_takes_three_cases_of_each_test_that_is_not_slow(tmp_path: Path) -> None:
    found, said = run(tmp_path, "--quick")
    assert found == {CASES[0], CASES[2], CASES[4], "test_with_one_case_at_night[0]"}
    assert "left out: 2 nightly tests, which --nightly runs\n" in said
    assert "left out: 3 slow tests and further cases, which run without --quick\n" in said


def test_the_processor_time_of_a_test_counts_its_processes_and_not_how_long_it_waits(tmp_path: Path) -> None:
    (tmp_path / "test_cost.py").write_text(
        "import subprocess, sys, time\n"
        "WORK = 'import time\\nwhile time.process_time() < 1: pass'\n"
        "def test_works(): subprocess.run([sys.executable, '-c', WORK], check=True)\n"
        "def test_waits(): time.sleep(2)\n"
    )
    _, said = run(tmp_path, "--processor-times", "5", "test_cost.py")
    costs = {test: float(cost) for cost, test in re.findall(r"^ *([\d.]+) s test_cost.py::(\w+)$", said, re.MULTILINE)}
    assert costs["test_works"] >= 0.9 > costs["test_waits"]
