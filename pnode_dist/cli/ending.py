"""The end of a command on all ranks: no rank waits for one that has failed."""

from __future__ import annotations

import argparse
import socket
import sys
import time
from typing import TYPE_CHECKING

from pnode_dist.cli.parser import FAILED, INTERRUPTED, PREEMPTED, PROGRAM, WRONG_USAGE, Command
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import abort

if TYPE_CHECKING:
    from mpi4py import MPI

_PATIENCE = 10.0


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
    except Exception:
        if together.size == 1:
            raise
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
            complain(error, f"[rank {together.rank} on {socket.gethostname()}] ")
            abort(code, together)
        time.sleep(0.005)
    if is_first(together):
        complain(error)
    return code


def complain(error: Exception, rank: str = "") -> None:
    line = " ".join(str(error).split())
    print(f"{rank}{PROGRAM}: error: {line}", file=sys.stderr, flush=True)


def is_first(comm: MPI.Intracomm) -> bool:
    return comm.rank == 0 and (comm.size > 1 or launched_rank() == 0)
