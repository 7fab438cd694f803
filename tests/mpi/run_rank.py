"""One rank's pytest: rank 0 writes to the terminal, the others to a log file of their own."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from mpi4py import MPI

from pnode_dist.system.abort import abort


def main() -> int:
    rank = MPI.COMM_WORLD.rank
    chosen = os.environ.get("PNODE_DIST_TEST_LOGS")
    logs = Path(MPI.COMM_WORLD.bcast(chosen or (tempfile.mkdtemp() if rank == 0 else None)))
    if rank > 0:
        log = (logs / f"rank{rank}.log").open("w", buffering=1)
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    arguments = ["-m", "mpi", "--with-mpi", "-p", "no:cacheprovider", f"--basetemp={logs / f'tmp{rank}'}"]
    return int(pytest.main([*arguments, *(sys.argv[1:] or [str(Path(__file__).parent)])]))


if __name__ == "__main__":
    status = main()
    if status != 0:
        # The others may be waiting for this rank in a collective that it will never reach.
        abort(status, MPI.COMM_WORLD)
