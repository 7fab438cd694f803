"""The configuration of a command, and the problem that it names, on every rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.train.configured import configured
from tests.unit.config.own_problems import FORECAST, TABLES, written

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "inside" / "my.toml", TABLES.format(kind="./mine.py:Decay"))


def test_a_command_has_the_configuration_and_the_problem_that_it_names(path: Path) -> None:
    file = written(path.with_name("mine.py"), FORECAST)
    config, found = configured(path, ["training.epochs=7"])

    assert (config.training.epochs, config.kind, found.kind) == (7, f"{file}:Decay", f"{file}:Decay")
    assert found.file == file


def test_what_is_wrong_with_the_file_is_raised_before_the_problem_is_looked_for(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--set epochs: must be section\.key=value"):
        configured(path, ["epochs"])


def test_what_is_wrong_with_the_problem_is_raised_with_the_file(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{path}: \[problem\] type = .*: there is no file "):
        configured(path, [])


def test_an_error_of_one_rank_in_importing_ends_all_with_one_line(path: Path, mpirun: Run) -> None:
    fails = "from mpi4py import MPI\nassert MPI.COMM_WORLD.rank == 0, 'only on the second rank'\n"
    file = written(path.with_name("mine.py"), fails + FORECAST)

    ran = mpirun(2, sys.executable, "-m", "pnode_dist.cli.main", "gradcheck", str(path))

    assert (ran.returncode, ran.stdout) == (2, "")
    # Open MPI's launcher reports the exit code as well.
    (line,) = (line for line in ran.stderr.splitlines() if "pnode" in line)
    assert "Traceback" not in ran.stderr
    assert line.startswith(f'pnode-dist: error: {path}: [problem] type = "./mine.py:Decay": {file}:2: AssertionError: ')


def test_the_file_is_read_on_the_first_rank_alone(path: Path, mpirun: Run) -> None:
    written(path.with_name("mine.py"), FORECAST)
    program = written(
        path.with_name("program.py"),
        "import sys\n"
        "from mpi4py import MPI\n"
        "from pnode_dist.train.configured import configured\n"
        "path = sys.argv[1] if MPI.COMM_WORLD.rank == 0 else 'nowhere.toml'\n"
        "config, found = configured(path, ['model.width=5'])\n"
        "kinds = MPI.COMM_WORLD.gather((config.model.width, found.kind))\n"
        "if kinds: print(kinds[0] == kinds[1], kinds[0][0], flush=True)\n",
    )

    ran = mpirun(2, sys.executable, str(program), str(path))

    assert (ran.returncode, ran.stdout) == (0, "True 5\n"), ran.stderr
