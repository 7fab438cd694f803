"""The programs in examples/ do what their READMEs say."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]
EXAMPLES = ROOT / "examples"
LOOP = str(EXAMPLES / "own_training_loop/train.py")
# As the tutorials show it.
LOOP_COMMAND = "launch/mpirun.sh -n 4 python examples/own_training_loop/train.py 2"


def test_the_training_loop_has_the_same_losses_on_two_replicas_of_two_ranks(mpirun: Run) -> None:
    alone = mpirun(1, "python", LOOP)
    assert alone.returncode == 0, alone.stderr
    lines = alone.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", str(number)] for number in range(1, 6)]
    assert float(lines[-1].split()[-1]) < 0.5 * float(lines[0].split()[-1])
    replicas = subprocess.run(
        LOOP_COMMAND.split(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert replicas.stdout == alone.stdout, replicas.stderr


@pytest.mark.nightly
def test_the_training_loop_has_the_same_losses_on_two_ranks(mpirun: Run) -> None:
    assert mpirun(2, "python", LOOP).stdout == mpirun(1, "python", LOOP).stdout


def test_the_problem_takes_about_40_lines(tmp_path: Path) -> None:
    lines = (EXAMPLES / "own_problem/mine.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) <= 45
