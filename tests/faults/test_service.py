"""A service in processes of its own: a rank that is killed, signals, idle ranks, and wrong requests without end."""

from __future__ import annotations

import os
import signal
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from pnode_dist.cli.exit_codes import FAILED
from tests.own_problems import changed, written
from tests.serving import Client, Started, started
from tests.unit.serve.test_listener import attack

RANKS = 2
OF_RATE = "forecast_of_parameters"
REQUEST = {"name": OF_RATE, "input": [[0.3]]}
VALID: dict[str, Any] = {
    "/Evaluate": REQUEST,
    "/Gradient": {**REQUEST, "outWrt": 0, "inWrt": 0, "sens": [1.0, 0.0]},
    "/ApplyJacobian": {**REQUEST, "outWrt": 0, "inWrt": 0, "vec": [1.0]},
    "/ApplyHessian": {**REQUEST, "outWrt": 0, "inWrt1": 0, "inWrt2": 0, "sens": [1.0, 0.0], "vec": [1.0]},
}


def seconds(process: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def busy(service: Started) -> None:
    """Wait until the ranks compute."""
    while "pnode_dist_serve_busy 1\n" not in Client(service.url).ask("/metrics")[1]:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_killed_rank_ends_the_job_and_the_open_request_with_an_error(rank: int, tmp_path: Path) -> None:
    outcomes: list[Any] = []

    def ask(url: str) -> None:
        try:
            outcomes.append(Client(url).ask("/Evaluate", REQUEST))
        except (OSError, HTTPException) as error:
            outcomes.append(error)

    # Steps so short that the solve would take minutes.
    with started(RANKS, tmp_path, written(tmp_path), "--set", "solver.step_size=1e-7") as service:
        client = threading.Thread(target=ask, args=(service.url,))
        client.start()
        busy(service)
        os.kill(service.ranks()[rank], signal.SIGKILL)
        client.join(60)
        assert isinstance(outcomes[0], OSError | HTTPException)
        # That of MPI's launcher, which names the signal.
        assert service.ended() == signal.SIGKILL
        assert "BAD TERMINATION" in service.log.read_text()


_HALO = """
from pnode_dist import GridPartition
from pnode_dist.exchange import halo


class Broken(Decay):
    def __init__(self, partition):
        super().__init__()
        self.partition = partition

    def forward(self, t, u):
        if float(self.rate) > 1 and self.partition.comm.rank == 1:
            raise RuntimeError("a mistake on one rank")
        return -self.rate * halo(u, self.partition)[..., 1:-1, :]
"""


@pytest.mark.nightly
def test_a_failure_that_leaves_other_ranks_waiting_ends_the_job(tmp_path: Path) -> None:
    source = changed("class Own(", _HALO + "\n\nclass Own(").replace(
        "DensePartition(self.mesh, self.settings.size)",
        "GridPartition(self.mesh, (self.settings.size,), 1, 'periodic')",
    )
    source = source.replace("return Decay()", "return Broken(self.partition)").replace(
        "reshape(4, 1, -1)", "reshape(4, 1, -1, 1)"
    )
    source = source.replace("np.exp(-times)[:, None]", "np.exp(-times)[:, None, None]")
    with started(RANKS, tmp_path, written(tmp_path, source)) as service:
        assert Client(service.url).ask("/Evaluate", REQUEST)[0] == 200
        with pytest.raises((OSError, HTTPException)):
            Client(service.url).ask("/Evaluate", {**REQUEST, "input": [[2.0]]})
        assert service.ended() == FAILED
        said = service.log.read_text()
        assert f"failed while the other ranks wait for this one: {OF_RATE}: RuntimeError: a mistake on one rank" in said


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_idle_ranks_sleep_and_sigterm_on_any_of_them_ends_the_service(rank: int, tmp_path: Path) -> None:
    # A limit that would end a service whose idle time counted as a hang.
    with started(RANKS, tmp_path, written(tmp_path), "--set", "run.hang_limit=3") as service:
        client = Client(service.url)
        assert client.ask("/Evaluate", REQUEST)[0] == 200
        time.sleep(1)
        before = [seconds(process) for process in service.ranks()]
        time.sleep(10)
        used = [seconds(process) - start for process, start in zip(service.ranks(), before, strict=True)]
        assert max(used) < 0.1  # 1 % of a core
        assert client.ask("/Evaluate", REQUEST)[0] == 200
        os.kill(service.ranks()[rank], signal.SIGTERM)
        assert service.ended() == 0
        assert "ended: every request is answered" in service.log.read_text()


@pytest.mark.nightly
def test_a_thousand_malformed_requests_leave_memory_as_it_was(tmp_path: Path) -> None:
    with started(RANKS, tmp_path, written(tmp_path)) as service:
        good = Client(service.url).output("/Evaluate", REQUEST)
        attack(service.url, 300, VALID)
        before = [resident(process) for process in service.ranks()]
        statuses = attack(service.url, 1000, VALID)
        assert statuses[400] > 500
        growth = [resident(process) - start for process, start in zip(service.ranks(), before, strict=True)]
        assert max(growth) < 2 * 2**20
        assert Client(service.url).output("/Evaluate", REQUEST) == good
