"""Lock of a run directory: one run at a time over all nodes, robust against killed runs.

The lock is a file that names its holder. The holder keeps an operating-system lock on the file, which is released when
the process dies. It also renews the modification time every few seconds, for nodes and file systems without such locks.
A lock that was not renewed for `LEASE` seconds, by the clock of the file system, belongs to a dead run.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pnode_dist.errors import ConfigurationError
from pnode_dist.system.file_clock import clock_of

LOCK = "lock.json"
LEASE = 60.0
_LOOK_AGAIN = 1.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class LockHolder:
    """LockHolder of a lock: a process on a host.

    `boot` identifies the boot of the host, `job` the Slurm job, if any, and `restarts` counts its requeues.
    """

    token: str
    host: str
    boot: str
    pid: int
    job: str
    restarts: int

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process() -> LockHolder:
    """Return a holder for this process, with a new token."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return LockHolder(
        secrets.token_hex(8),
        socket.gethostname(),
        _boot(),
        os.getpid(),
        os.environ.get("SLURM_JOB_ID", ""),
        int(restarts) if restarts.isdigit() else 0,
    )


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


class RunLock:
    """Lock of a run directory, acquired on construction, and released by `release` or by the end of the process.

    Construction waits up to `patience` seconds to determine whether a holder on another node is alive.
    Raises `ConfigurationError`, which names the holder, if it is alive, and `OSError` if the directory cannot be
    written.
    """

    def __init__(self, directory: Path, patience: float = LEASE) -> None:
        self._path, self._holder = directory / LOCK, this_process()
        self._descriptor: int | None = None
        descriptor, name = tempfile.mkstemp(prefix=f".{LOCK}.", dir=directory)
        try:
            os.write(descriptor, (json.dumps(asdict(self._holder)) + "\n").encode())
            # On a file system without locks, renewals alone show that the holder is alive.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while not self._taken(name):
                holder = read_holder(directory)
                if holder is not None and is_alive(directory, holder, patience):
                    raise ConfigurationError(f"run directory {directory}: is in use by {holder}")
                _set_aside(self._path, holder)
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            Path(name).unlink(missing_ok=True)
        self._descriptor = descriptor

    def _taken(self, name: str) -> bool:
        try:
            os.link(name, self._path)
        except FileExistsError:
            return False
        return True

    def renew(self) -> None:
        """Update the modification time of the lock. Raises `OSError` if it is missing or has another holder."""
        holder = read_holder(self._path.parent)
        if holder != self._holder:
            raise OSError(f"its lock was taken by {holder}" if holder else "its lock is not there any more")
        os.utime(self._path)

    def release(self) -> None:
        """Release the lock. Further calls have no effect."""
        if self._descriptor is not None:
            if read_holder(self._path.parent) == self._holder:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def read_holder(directory: Path) -> LockHolder | None:
    """Return the holder of the lock of a run directory; None if there is none."""
    try:
        return LockHolder(**json.loads((directory / LOCK).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_alive(directory: Path, holder: LockHolder, patience: float = 0.0) -> bool:
    """Return True if the holder of a lock is alive; wait up to `patience` seconds if only a renewal can show it."""
    path, own = directory / LOCK, this_process()
    if (holder.job, holder.restarts) < (own.job, own.restarts) and holder.job == own.job:
        return False  # An earlier start of the same, since requeued, job.
    locked = _is_locked(path)
    if locked is not None and (locked or (holder.boot and holder.boot == own.boot)):
        return locked
    if locked is None and holder.boot and holder.boot == own.boot:
        return Path(f"/proc/{holder.pid}").exists()
    until = time.monotonic() + patience
    first = last = _renewed(path)
    while last is not None and last == first and clock_of(directory, f".{LOCK}.") - last <= LEASE:
        if time.monotonic() >= until:
            return True
        time.sleep(_LOOK_AGAIN)
        last = _renewed(path)
    return last is not None and last != first


def _is_locked(path: Path) -> bool | None:
    """Return True if a process holds a system lock on the file; None if this cannot be determined."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _renewed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _set_aside(path: Path, holder: LockHolder | None) -> None:
    """Remove the lock of a dead holder, but keep a lock acquired by another process in the meantime."""
    aside = path.with_name(f".{LOCK}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    try:
        found = LockHolder(**json.loads(aside.read_bytes()))
    except (ValueError, TypeError):
        found = None
    if found != holder:
        with suppress(FileExistsError):
            os.link(aside, path)
    os.unlink(aside)
