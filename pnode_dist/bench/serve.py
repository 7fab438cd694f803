"""The resident service under load, against one job of MPI for each request.

Clients send evaluations of a small Gray-Scott forecast to a service of two ranks. Overhead is the time of a request
beyond the computation of the ranks. Every answer is compared with that of this process, which solves on one rank.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.distributed.launcher import hide_from_children
from pnode_dist.errors import ConfigurationError
from pnode_dist.train.configured import configured
from pnode_dist.train.run import build_problem, mesh_of

RANKS, CLIENTS, REQUESTS, LAUNCHES = 2, 6, 100, 3
MODEL, MODES = "forecast_of_initial_state", 8
_MOST_OVERHEAD, _LARGEST_DIFFERENCE = 5.0, 1e-10
_PATIENCE = 300.0
_CONFIG = """
[run]
name = "serve"
[problem]
type = "gray_scott"
shape = [16, 16]
domain = [0.4, 0.4]
trajectories = 2
validation = 1
times = 9
interval = 10.0
window = 2
[model]
channels = 8
layers = 2
[solver]
method = "rk4"
step_size = 2.0
[training]
epochs = 1
batch_size = 2
dtype = "float64"
[evaluation]
leads = [1, 2]
"""
Output = list[list[float]]


def run() -> Report:
    """Measure a service under load and a job for each request. Raises `ConfigurationError` on several ranks."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench serve: starts ranks of its own: must run on 1 rank, not {MPI.COMM_WORLD.size}")
    # The ranks that are started here are not those of a launcher that may have started this process.
    hide_from_children()
    draws = random.Random(0)
    inputs = [[[draws.gauss(0.0, 0.3) for _ in range(MODES)]] for _ in range(CLIENTS * REQUESTS)]
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "serve.toml"
        config.write_text(_CONFIG)
        expected = _computed_here(config, inputs)
        with _service(config) as address:
            # The first request makes the solver.
            _ask(address, inputs[:1])
            alone = _measured(address, [inputs[:REQUESTS]])
            together = _measured(address, [inputs[number::CLIENTS] for number in range(CLIENTS)])
        jobs = [_one_job(config, inputs[number]) for number in range(LAUNCHES)]
    pairs = [
        *zip(alone.outputs, expected[:REQUESTS], strict=True),
        *zip(together.outputs, [one for number in range(CLIENTS) for one in expected[number::CLIENTS]], strict=True),
        *zip([output for output, _ in jobs], expected[:LAUNCHES], strict=True),
    ]
    difference = max(_difference(found, right) for found, right in pairs)
    job = statistics.median(seconds for _, seconds in jobs)
    rows = [alone.row("one client", 1), together.row(f"{CLIENTS} clients", CLIENTS), _job_row(job)]
    checks = [
        Check("one client: ms of overhead", alone.overhead, _MOST_OVERHEAD),
        Check(f"{CLIENTS} clients: ms of overhead", together.overhead, _MOST_OVERHEAD),
        Check("largest difference of an answer", difference, _LARGEST_DIFFERENCE),
    ]
    notes = [
        f"a service of {RANKS} ranks answers {job / together.seconds_each:.0f} requests in the time of one job of "
        "MPI that computes one"
    ]
    return Report("serve", rows, checks, notes)


class _Load:
    """Answers to some clients, the seconds of wall time until all had theirs, and those that the ranks computed."""

    def __init__(self, outputs: Sequence[Output], seconds: float, computed: float) -> None:
        self.outputs = outputs
        self.seconds_each, self.computed_each = seconds / len(outputs), computed / len(outputs)
        self.overhead = 1e3 * (self.seconds_each - self.computed_each)

    def row(self, name: str, clients: int) -> Row:
        return {
            "requests": name,
            "a second": 1 / self.seconds_each,
            "ms each": 1e3 * self.seconds_each,
            "ms computed": 1e3 * self.computed_each,
            "ms of overhead": self.overhead,
        }


def _job_row(seconds: float) -> Row:
    empty = float("nan")
    return {
        "requests": "a job of MPI for each",
        "a second": 1 / seconds,
        "ms each": 1e3 * seconds,
        "ms computed": empty,
        "ms of overhead": empty,
    }


def _measured(address: str, shares: Sequence[Sequence[Any]]) -> _Load:
    """Let each client send its share of the inputs at the same time, one after the other."""
    outputs: list[list[Output]] = [[] for _ in shares]
    clients = [
        threading.Thread(target=lambda number=number, share=share: outputs[number].extend(_ask(address, share)))
        for number, share in enumerate(shares)
    ]
    computed, began = _computed_seconds(address), time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    seconds = time.perf_counter() - began
    return _Load(list(chain(*outputs)), seconds, _computed_seconds(address) - computed)


def _ask(address: str, inputs: Sequence[Any]) -> list[Output]:
    connection = http.client.HTTPConnection(address, timeout=_PATIENCE)
    outputs = []
    for vectors in inputs:
        connection.request("POST", "/Evaluate", json.dumps({"name": MODEL, "input": vectors, "config": {}}))
        outputs.append(json.loads(connection.getresponse().read())["output"])
    connection.close()
    return outputs


def _computed_seconds(address: str) -> float:
    """Return the seconds that the ranks have computed evaluations so far."""
    connection = http.client.HTTPConnection(address, timeout=_PATIENCE)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    name = 'pnode_dist_serve_computed_seconds_total{path="/Evaluate"}'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@contextmanager
def _service(config: Path) -> Iterator[str]:
    """Yield host and port of a service while it runs."""
    url_file = config.with_suffix(".url")
    log = config.with_suffix(".log")
    command = ["pnode_dist.cli.main", "serve", str(config), "--port", "0", "--url-file", str(url_file)]
    with log.open("wb") as output:
        launcher = subprocess.Popen([*_mpiexec(), *command], stdout=output, stderr=output)
    try:
        until = time.monotonic() + _PATIENCE
        while not url_file.exists():
            if launcher.poll() is not None or time.monotonic() > until:
                raise ConfigurationError(f"bench serve: the service did not start: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield url_file.read_text().strip().removeprefix("http://")
    finally:
        launcher.terminate()
        launcher.wait()


def _one_job(config: Path, vectors: Any) -> tuple[Output, float]:
    """Compute one request in a job of its own; its output and seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [*_mpiexec(), "pnode_dist.bench.serve_once", str(config), MODEL, json.dumps(vectors)],
        capture_output=True,
        check=True,
        timeout=_PATIENCE,
    )
    seconds = time.perf_counter() - began
    output: Output = json.loads(done.stdout.splitlines()[-1])
    return output, seconds


def _computed_here(config: Path, inputs: Sequence[Any]) -> list[Output]:
    settings, found = configured(config, ())
    with mesh_of(settings) as mesh:
        problem = build_problem(settings, mesh, found=found)
        model = next(model for model in problem.served() if model.name == MODEL)
        given = [[torch.tensor(vector, dtype=torch.float64) for vector in vectors] for vectors in inputs]
        return [[vector.tolist() for vector in model.evaluate(vectors, {})] for vectors in given]


def _difference(found: Output, expected: Output) -> float:
    return max(abs(one - other) for one, other in zip(chain(*found), chain(*expected), strict=True))


def _mpiexec() -> list[str]:
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        raise ConfigurationError("bench serve: needs mpiexec on the PATH")
    if (os.cpu_count() or 1) < RANKS:
        # Ranks of MPICH that wait give the core to others.
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    return [launcher, "-n", str(RANKS), sys.executable, "-m"]
