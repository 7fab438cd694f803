"""Machines made of Linux name spaces: their own network, host name, processes and shared memory; one file system.

Nothing has a name outside, so several can be at work at once, and everything goes with the processes that hold it:
these end with whoever started them, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_STARTING, _ENDING = 300.0, 300.0
_PROGRAMS = ("ip", "nsenter", "unshare")


def missing() -> str | None:
    """Why there can be no such machines here; None if there can."""
    if os.getuid() != 0:
        return "needs root"
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"], check=False)
    return None if tried.returncode == 0 else "needs name spaces, which are not allowed here"


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A process that is killed when this one ends."""

    def with_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with log.open("ab") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=with_parent)


@dataclass(frozen=True)
class Machine:
    """A running machine: the process that holds its name spaces, and the program that is its first process."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    first: int

    def inside(self, *command: str) -> list[str]:
        """A command line that runs `command` in here, in the working directory that it is started in."""
        spaces = ("--net", "--uts", "--ipc", "--mount", "--pid")
        return ["nsenter", "--target", str(self.first), *spaces, "--wd=.", *command]

    def stop(self) -> None:
        """End all of its processes at once, as if the power had failed."""
        # The kernel forgets to end a first process with its holder once that has become another user.
        if self.holder.poll() is None:
            os.kill(self.first, signal.SIGKILL)
        self.holder.kill()
        self.holder.wait(_ENDING)


def boot(name: str, address: str, script: str, log: Path, hosts: Path) -> Machine:
    """Start a machine whose first process runs `script`, a piece of shell, once it has its address on a network.

    `hosts` is what it reads for /etc/hosts. Raises `RuntimeError` if it does not come up.
    """
    setup = (
        f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && mount --bind '{hosts}' /etc/hosts && "
        f"ip link set lo up && until ip -4 -o address show | grep -q {address}/; do sleep 0.02; done && {script}"
    )
    # File systems that are mounted outside later on are there too.
    spaces = ["--net", "--uts", "--ipc", "--mount", "--propagation=slave", "--pid"]
    spaces += ["--fork", "--kill-child", "--mount-proc"]
    holder = start(["unshare", *spaces, "sh", "-c", setup], log)
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")

    def born() -> bool:
        # Before it has its name the child may still be about to become that shell.
        pids = children.read_text().split()
        return bool(pids) and Path(f"/proc/{pids[0]}/comm").read_text().strip() == "sh"

    wait_until(born, _STARTING, f"machine {name} to start")
    return Machine(name, address, holder, int(children.read_text().split()[0]))


def make_switch(machine: Machine) -> None:
    """Give a machine a bridge that others can be connected to, and its address on it."""
    _ip(machine, "link", "add", "bridge", "type", "bridge")
    _ip(machine, "link", "set", "bridge", "up")
    _ip(machine, "address", "add", f"{machine.address}/24", "dev", "bridge")


def connect(machine: Machine, switch: Machine) -> None:
    """Put a machine on the bridge of another, under its address."""
    port = ("type", "veth", "peer", "name", "eth0", "netns", str(machine.first))
    _ip(switch, "link", "add", machine.name, *port)
    _ip(switch, "link", "set", machine.name, "master", "bridge", "up")
    _ip(machine, "link", "set", "eth0", "up")
    _ip(machine, "address", "add", f"{machine.address}/24", "dev", "eth0")


def cut_off(machine: Machine, switch: Machine) -> None:
    """Take a machine off the network; it does not notice."""
    _ip(switch, "link", "set", machine.name, "down")


def plug_in(machine: Machine, switch: Machine) -> None:
    """Put a machine that was cut off back on the network."""
    _ip(switch, "link", "set", machine.name, "up")


def _ip(machine: Machine, *arguments: str) -> None:
    command = ["nsenter", "--target", str(machine.first), "--net", "ip", *arguments]
    subprocess.run(command, check=True, timeout=_STARTING)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; raise `RuntimeError` if it does not come true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)
