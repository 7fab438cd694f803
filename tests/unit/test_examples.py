"""The programs in examples/ do what their READMEs say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT
from tests.tiers import at_night

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


@pytest.mark.parametrize("ranks", at_night([1, 2], but=[2]))
def test_point_values_have_the_gradient_of_those_of_all_states(mpirun: Run, ranks: int) -> None:
    points = str(EXAMPLES / "large_outputs/points.py")
    found, wanted = (mpirun(ranks, "python", points, "24", "30", *kept) for kept in ([], ["states"]))
    assert found.returncode == wanted.returncode == 0, found.stderr + wanted.stderr
    numbers, others = (run.stdout.splitlines()[0].split(": ")[1].split() for run in (found, wanted))
    assert len(numbers) == 4
    assert [float(number) for number in numbers] == pytest.approx([float(other) for other in others], rel=1e-12)


@pytest.mark.parametrize("ranks", at_night([1, 2], but=[2]))
def test_a_gradient_within_a_budget_is_that_through_all_steps(mpirun: Run, ranks: int) -> None:
    program = str(EXAMPLES / "long_gradient/turbulence.py")
    found = mpirun(ranks, "python", program, "24", "40", "64KiB", "128KiB")
    wanted = mpirun(1, "python", program, "24", "40", "naive")
    assert found.returncode == wanted.returncode == 0, found.stderr + wanted.stderr
    numbers, others = (run.stdout.splitlines()[0].split(": ")[1].split() for run in (found, wanted))
    assert len(numbers) == 4
    assert [float(number) for number in numbers] == pytest.approx([float(other) for other in others], rel=1e-11)
    steps, recomputed, adjoint = (int(word) for word in re.findall(r"\d+", found.stdout.splitlines()[2]))
    assert (steps, adjoint) == (40, 40)
    assert recomputed > 20


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_the_gradient_through_5000_steps_stays_within_the_budget(mpirun: Run) -> None:
    program = str(EXAMPLES / "long_gradient/turbulence.py")
    finished = mpirun(2, "python", program, "512", "5000", "32MiB", "2GiB", "float32", timeout=7000)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout.split()[-2]) < 256


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_2000_outputs_of_a_large_state_stay_within_the_budget(mpirun: Run) -> None:
    points = str(EXAMPLES / "large_outputs/points.py")
    finished = mpirun(2, "python", points, "512", "2000", timeout=7000)
    assert finished.returncode == 0, finished.stderr
    # 256 MiB of checkpoints, and the graph of one step. The states would be 4,000 MiB for each rank.
    assert float(finished.stdout.split()[-2]) < 512
