"""The run of torchdiffeq's own tests tells passed, refused and failed cases apart, and fails if one failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pnode_dist.bench.torchdiffeq_suite import FILES, main

# Cases of each kind, in the form of torchdiffeq's tests.
CASES = """
import unittest
import torch
import torchdiffeq


class TestKinds(unittest.TestCase):
    def test_methods(self):
        for method in ("dopri5", "explicit_adams", "scipy_solver"):
            with self.subTest(method=method):
                y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method=method)
                self.assertLess((y[-1] - torch.tensor(-1.0).exp()).abs().max(), 1e-5)

    def test_whole(self):
        self.assertTrue(callable(torchdiffeq.odeint_event))


class TestDiscontinuities(unittest.TestCase):
    def test_odeint_perturb(self):
        with self.subTest(adjoint=True, method="euler"):
            self.assertIn(1.0, [])
"""
WRONG = """

class TestWrong(unittest.TestCase):
    def test_failure(self):
        self.assertEqual(1, 2)
"""


def checkout(folder: Path, more: str = "") -> Path:
    """A folder with the files of torchdiffeq's tests, of which one has cases."""
    (folder / "tests").mkdir()
    for name in FILES:
        (folder / f"tests/{name}.py").write_text(CASES + more if name == "odeint_tests" else "import torchdiffeq\n")
    return folder


def test_cases_are_counted_by_their_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.modules.get("torchdiffeq")
    assert main([str(checkout(tmp_path))]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["TestKinds.test_methods", "1", "2", "0", "0"] in lines
    assert ["TestKinds.test_whole", "1", "0", "0", "0"] in lines
    assert ["TestDiscontinuities.test_odeint_perturb", "0", "0", "1", "0"] in lines
    assert ["all", "2", "2", "1", "0"] in lines
    assert ["refused,", "1:", "method", "=", "'scipy_solver'"] in lines
    assert sys.modules.get("torchdiffeq") is before


def test_a_failed_case_ends_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkout(tmp_path, WRONG)), "--only", "TestWrong"]) == 1
    assert "failed, 1: TestWrong.test_failure: AssertionError: 1 != 2" in capsys.readouterr().out


def test_a_folder_without_the_tests_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "must be one of torchdiffeq, with tests/api_tests.py" in capsys.readouterr().err
