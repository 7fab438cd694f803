"""Output that nobody reads: the command ends silently."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pnode_dist.cli.ending import is_closed_pipe
from pnode_dist.cli.exit_codes import CLOSED_PIPE
from pnode_dist.system.compatibility import check_mpi
from tests.conftest import PATIENCE


def ended(arguments: list[str], standard_error: bool = False) -> tuple[int, str]:
    """The exit code and standard error of a command whose standard output, or error, is closed from the beginning."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pnode_dist.cli.main", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": writer} if standard_error else {
        "stdout": writer, "stderr": subprocess.PIPE
    }  # fmt: skip
    done = subprocess.run(command, **streams, text=True, timeout=PATIENCE, check=False)
    os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["methods"],
        ["--help"],
        pytest.param(["methods", "--json"], marks=pytest.mark.nightly),
        pytest.param(["config", "reference"], marks=pytest.mark.nightly),
        pytest.param(["completion", "zsh"], marks=pytest.mark.nightly),
        # Those start MPI and PETSc.
        pytest.param(["doctor", "--", "-log_view"], marks=pytest.mark.nightly),
        pytest.param(["doctor", "--json"], marks=pytest.mark.nightly),
        pytest.param(["methods", "--", "-log_view"], marks=pytest.mark.nightly),
    ],
    ids=" ".join,
)
def test_a_command_ends_silently_if_its_output_is_closed(arguments: list[str]) -> None:
    assert ended(arguments) == (CLOSED_PIPE, "")


@pytest.mark.slow
def test_a_solve_ends_silently_if_its_output_is_closed(config_file: Path) -> None:
    assert ended(["gradcheck", str(config_file)]) == (CLOSED_PIPE, "")


@pytest.mark.nightly
def test_a_training_ends_if_nobody_reads_its_progress(config_file: Path) -> None:
    assert ended(["train", str(config_file)], standard_error=True)[0] == CLOSED_PIPE


def test_a_pipe_that_closes_is_left_to_python_after_petsc_is_loaded() -> None:
    check_mpi()

    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN


def test_another_broken_pipe_is_an_error_as_any_other() -> None:
    assert not is_closed_pipe(BrokenPipeError())
    assert not is_closed_pipe(SystemExit(1))
