"""Ending all ranks from one of them, without losing its output.

A launcher reads the output of ranks from pipes, and stops reading when it aborts. A message that is still in a pipe is
lost. (MPICH's hydra passes on the output that it has read before it aborts.) So the output is delivered first.
"""

from __future__ import annotations

import faulthandler
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from mpi4py import MPI

PATIENCE = 2.0
HUNG = 70
"""The exit code (EX_SOFTWARE) of a job that hangs."""
_FORWARDING = 0.2
_ABORTING = 5.0
_STANDARD_OUTPUT, _STANDARD_ERROR = 1, 2
_before: list[Callable[[], None]] = []


def before_abort(action: Callable[[], None]) -> None:
    """Run `action` before an abort, which runs neither finalizers nor `atexit` functions."""
    _before.append(action)


def abort(code: int, comm: MPI.Comm | None) -> NoReturn:
    """End all ranks of `comm` with an exit code, after delivering this rank's output. None: end this process alone.

    Not collective: one rank ends the others at any place. This rank ends even if MPI cannot abort.
    """
    for action in _before:
        # An error here must not keep the other ranks waiting.
        with suppress(Exception):
            action()
    deliver_output()
    if comm is not None:
        # Where the network has gone MPI waits here as well, and gives way to no thread of Python. This is another one,
        # which ends the process.
        faulthandler.dump_traceback_later(_ABORTING, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        comm.Abort(code)
    os._exit(code)


def deliver_output(patience: float = PATIENCE) -> bool:
    """Flush standard output and error, and wait until their readers have read everything.

    Waits for at most `patience` seconds. Returns True if everything was read.
    """
    for stream in (sys.stdout, sys.stderr):
        # Closed, replaced, or without a reader: there is nothing to wait for then.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    until = time.monotonic() + patience
    while any(unread_bytes(file) for file in (_STANDARD_OUTPUT, _STANDARD_ERROR)):
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    time.sleep(_FORWARDING)
    return True


def unread_bytes(file: int) -> int:
    """Return the number of unread bytes in a pipe or socket; 0 for other files, and if unknown."""
    with suppress(ImportError, OSError):
        import fcntl
        import termios

        mode = os.fstat(file).st_mode
        # On Linux either end of a pipe answers FIONREAD; on a socket that would be what there is to read from it.
        request = termios.FIONREAD if stat.S_ISFIFO(mode) else termios.TIOCOUTQ if stat.S_ISSOCK(mode) else None
        if request is not None:
            return int.from_bytes(fcntl.ioctl(file, request, bytes(4)), sys.byteorder)
    return 0
