"""Trains a configuration in a process that is killed again and again, at random, and resumed each time.

    python lives.py CONFIG RUN_DIR KILLS SEED

Every life is a fork of this process, which has loaded what takes long to load, also by optimisers, but has not started
MPI.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import h5netcdf  # noqa: F401
import h5py  # noqa: F401
import torch._dynamo
import torch.distributed  # noqa: F401
import xarray  # noqa: F401
from torch.optim.optimizer import register_optimizer_step_post_hook

MOST_STEPS = 6
"""A life stops before it takes more, however late it is killed: the training must not end before the last kill."""


def steps(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def stop_after(most: int) -> None:
    """Stop this process, as a debugger does, in the optimiser step of that number."""
    taken = 0

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == most:
            os.kill(os.getpid(), signal.SIGSTOP)

    register_optimizer_step_post_hook(count)


def live(config: str, run: Path, for_ever: bool = False) -> int:
    """Begin a life; its process."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from pnode_dist.cli.main import main
        from pnode_dist.system import scratch

        scratch._GRACE = 0.5
        if not for_ever:
            stop_after(MOST_STEPS)
        code = main(["train", config, "--run-dir", str(run), "--resume", "auto"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    config, run, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    chance = random.Random(seed)
    for _ in range(kills):
        process = live(config, run)
        enough = steps(run) + chance.randrange(MOST_STEPS)
        changed = 0
        while steps(run) < enough and not changed:
            time.sleep(0.002)
            changed, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED)
        if changed and not os.WIFSTOPPED(status):
            sys.exit(f"a life ended by itself: {status}")
        time.sleep(chance.random() * 0.05)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    _, status = os.waitpid(live(config, run, for_ever=True), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
