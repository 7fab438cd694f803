"""Private scratch directories that do not outlive their process.

A directory is removed with its object, at interpreter exit, when this rank ends all others on an error, and on SIGTERM
(unless the program handles that itself). Directories of killed processes are removed by the next process on that host
that uses the same parent: a live process holds a lock on its directory, which the system releases when it dies. The
host is part of the name, because locks on a shared file system may hold on one host alone.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from mpi4py import MPI

from pnode_dist.system.abort import before_abort
from pnode_dist.system.file_clock import clock_of

PREFIX = "pnode-dist-"
_GRACE = 60.0
_FOR_OTHERS = 2.0
_live: set[Path] = set()


class PrivateDirectory:
    """A new directory under `parent`, readable by its owner only and with an unguessable name.

    Raises `OSError` if it cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        _remove_leftovers(parent)
        self.path = Path(tempfile.mkdtemp(prefix=prefix(), dir=parent))
        lock = os.open(self.path, os.O_RDONLY)
        # Without locks no other process can lock, and remove, this directory either.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        _live.add(self.path)
        _remove_on_sigterm()
        self.remove: Callable[[], None] = weakref.finalize(self, _remove, self.path, lock)
        """Remove the directory now. A second call does nothing."""


def prefix() -> str:
    """Return the prefix of the names of this host's directories."""
    return f"{PREFIX}{socket.gethostname()}-"


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    _live.discard(path)


def _remove_leftovers(parent: Path) -> None:
    """Remove this user's directories whose processes have ended."""
    now: float | None = None
    for path in parent.glob(f"{glob.escape(prefix())}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            # A directory made a moment ago is not locked yet.
            old = os.fstat(lock)
            now = clock_of(parent, ".pnode-dist-") if now is None else now
            if old.st_uid == os.getuid() and now - old.st_mtime > _GRACE:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(lock)


def _remove_live() -> None:
    for path in list(_live):
        shutil.rmtree(path, ignore_errors=True)


before_abort(_remove_live)


def _remove_on_sigterm() -> None:
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return

    def clean_up(number: int, frame: FrameType | None) -> None:
        _remove_live()
        if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.size > 1:
            # Launchers kill all ranks when the first one dies, and the others may still be working.
            time.sleep(_FOR_OTHERS)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, clean_up)
