"""Ending all ranks from one of them, without losing what it has said.

A launcher reads what a rank writes from pipes, and once it is told to abort it reads no more: the message that says why
is lost if it is still in its pipe. (MPICH's hydra passes on what it has read before it takes up the abort; others do so
at their leisure.)
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
    """Do `action` when this process is about to end that way, which neither finalizers nor `atexit` hear of."""
    _before.append(action)


def abort(code: int, comm: MPI.Comm | None) -> NoReturn:
    """End all ranks of `comm` with an exit code, once what this one wrote has been read; None: end this process alone.

    Not collective: one rank ends the others, wherever they are. This one ends even if MPI cannot do that.
    """
    for action in _before:
        # What cannot be tidied up must not keep the other ranks waiting.
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
    """Flush standard output and error, and wait until whoever reads them has read everything and passed it on.

    Waits for so many seconds at most; returns whether everything was read.
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
    """How much of what was written to a pipe or socket has not been read; 0 for other files, and where nobody tells."""
    with suppress(ImportError, OSError):
        import fcntl
        import termios

        mode = os.fstat(file).st_mode
        # On Linux either end of a pipe answers FIONREAD; on a socket that would be what there is to read from it.
        request = termios.FIONREAD if stat.S_ISFIFO(mode) else termios.TIOCOUTQ if stat.S_ISSOCK(mode) else None
        if request is not None:
            return int.from_bytes(fcntl.ioctl(file, request, bytes(4)), sys.byteorder)
    return 0
