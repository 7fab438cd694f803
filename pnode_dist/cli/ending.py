"""The end of a command on all ranks: no rank waits for one that has failed."""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
import time
from typing import TYPE_CHECKING

from pnode_dist.cli.exit_codes import CLOSED_PIPE, FAILED, INTERRUPTED, PREEMPTED, WRONG_USAGE
from pnode_dist.cli.parser import PROGRAM, Command
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import abort

if TYPE_CHECKING:
    from mpi4py import MPI

_PATIENCE = 10.0


def run_alone(command: Command, arguments: argparse.Namespace) -> int:
    """Run a command that needs no other rank; the exit code."""
    try:
        return command(arguments)
    except ConfigurationError as error:
        if launched_rank() == 0:
            print_error(error)
        return WRONG_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def run_together(command: Command, arguments: argparse.Namespace) -> int:
    """Run a command on all ranks, and let no rank wait for one that has failed. Collective on the world."""
    from mpi4py import MPI

    from pnode_dist.checkpointing.store import PrecisionError, SpillError
    from pnode_dist.errors import ConvergenceError, StepSizeError
    from pnode_dist.runs.endings import DivergenceError, Preempted, RunDirectoryError

    # Of its own, because the other ranks may be anywhere in the program when one fails.
    together = MPI.COMM_WORLD.Dup()
    try:
        code = command(arguments)
    except ConfigurationError as error:
        return _end(error, WRONG_USAGE, together)
    except (
        ConvergenceError,
        DivergenceError,
        PrecisionError,
        RunDirectoryError,
        SpillError,
        StepSizeError,
    ) as error:
        return _end(error, FAILED, together)
    except Preempted as end:
        if is_first(together):
            print(f"{PROGRAM}: {end}", file=sys.stderr, flush=True)
        return PREEMPTED
    except KeyboardInterrupt:
        if is_first(together):
            print(f"{PROGRAM}: interrupted", file=sys.stderr, flush=True)
        if together.size > 1:
            abort(INTERRUPTED, together)
        return INTERRUPTED
    except (Exception, SystemExit) as error:
        if together.size == 1:
            raise
        if is_closed_pipe(error):
            leave_output()
            abort(CLOSED_PIPE, together)
        # The hook of an open mesh names the rank and ends all; without one, this does.
        sys.excepthook(*sys.exc_info())
        abort(FAILED, together)
    together.Free()
    return code


def _end(error: Exception, code: int, together: MPI.Intracomm) -> int:
    """Say what is wrong once if all ranks have come to it; if some have not, end them."""
    everyone = together.Ibarrier()
    patient_until = time.monotonic() + _PATIENCE
    while not everyone.Test():
        if time.monotonic() > patient_until:
            print_error(error, f"[rank {together.rank} on {socket.gethostname()}] ")
            abort(code, together)
        time.sleep(0.005)
    if is_first(together):
        print_error(error)
    return code


def is_closed_pipe(error: BaseException) -> bool:
    """Return True for an error of a closed standard output or error."""
    if isinstance(error, SystemExit):
        # rich has replaced the standard output and exits with a code of its own.
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and _output_is_closed()


def _output_is_closed() -> bool:
    watched = select.poll()
    for number in (1, 2):
        watched.register(number, 0)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in watched.poll(0))


def leave_output() -> None:
    """Discard what is still written to standard output and error, at the end of the process too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def print_error(error: Exception, rank: str = "") -> None:
    """Print an error as one line on standard error."""
    line = " ".join(str(error).split())
    print(f"{rank}{PROGRAM}: error: {line}", file=sys.stderr, flush=True)


def is_first(comm: MPI.Intracomm) -> bool:
    """Return True on the rank that prints for all."""
    return comm.rank == 0 and (comm.size > 1 or launched_rank() == 0)
