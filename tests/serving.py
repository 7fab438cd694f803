"""A service for a test: the ranks of the test serve models while a client runs on a thread of rank 0."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from mpi4py import MPI

from pnode_dist import ConfigurationError, ConvergenceError, Mesh
from pnode_dist.serve.service import ServiceOptions, serve
from pnode_dist.train.served_model import GRADIENT, HESSIAN, Settings, SummedModel, Vectors
from tests.conftest import ROOT

Result = TypeVar("Result")
PATIENCE = 120.0
COUPLED, FAILING = "coupled", "failing"


class Coupled(SummedModel):
    """F_0(x, y) = scale x (y . y) for x in R^2 and y in R^3, and F_1 = (x . x) y_0, as shares of the ranks."""

    def __init__(self, comm: MPI.Comm) -> None:
        super().__init__(COUPLED, comm)

    def input_sizes(self, config: Settings) -> Sequence[int]:
        return [2, 3]

    def output_sizes(self, config: Settings) -> Sequence[int]:
        for key, value in config.items():
            if key != "scale" or not isinstance(value, float | int):
                raise ConfigurationError(f"config: {key} = {value!r}: must be a number called scale")
        return [2, 1]

    def shares(self, inputs: Vectors, config: Settings) -> Vectors:
        x, y = inputs
        share = (self.comm.rank + 1) / sum(range(1, self.comm.size + 1))
        return [share * config.get("scale", 1.0) * x * (y @ y), share * (x @ x) * y[:1]]


class Failing(SummedModel):
    """A model of one number that does what `config` says: `converge`, `lose` or `shorten` its answer, or `break`.

    With `rank`, it does so on that rank alone. It has no second derivatives.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        super().__init__(FAILING, comm)

    def refusal(self, operation: str) -> str | None:
        return "has no second derivatives" if operation == HESSIAN else None

    def input_sizes(self, config: Settings) -> Sequence[int]:
        return [1]

    def output_sizes(self, config: Settings) -> Sequence[int]:
        return [1]

    def shares(self, inputs: Vectors, config: Settings) -> Vectors:
        action = config.get("action", "")
        if config.get("rank", self.comm.rank) == self.comm.rank:
            if action == "converge":
                raise ConvergenceError("step 3 has no solution")
            if action == "break":
                raise RuntimeError("a mistake in f")
        if action == "lose":
            return [inputs[0] * torch.nan]
        return [torch.cat([inputs[0], inputs[0]])] if action == "shorten" else [inputs[0] / self.comm.size]


def while_served(
    models: Sequence[Any],
    mesh: Mesh,
    directory: Path,
    client: Callable[[str], Result],
    options: Mapping[str, Any] | None = None,
) -> Result | None:
    """Serve until the client is done; its result on rank 0, None on the others. Collective on the world."""
    found: list[Result] = []
    failure: list[BaseException] = []
    ended = threading.Event()
    url_file = directory / f"url-{time.monotonic_ns()}"

    def run() -> None:
        try:
            found.append(client(written(url_file, ended)))
        except BaseException as error:
            failure.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run, daemon=True)
    # Signals of a client whose service has ended otherwise.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if mesh.is_root:
            thread.start()
        serve(models, mesh, ServiceOptions(port=0, url_file=url_file, **(options or {})), 0.0)
    finally:
        ended.set()
        if mesh.is_root:
            thread.join(PATIENCE)
        signal.signal(signal.SIGTERM, before)
    if failure:
        raise failure[0]
    return found[0] if found else None


def written(url_file: Path, ended: threading.Event | None = None) -> str:
    """Wait for a service's file; its URL."""
    until = time.monotonic() + PATIENCE
    while not url_file.exists():
        assert time.monotonic() < until, "the service does not answer"
        assert ended is None or not ended.is_set(), "the service has ended"
        time.sleep(0.01)
    return url_file.read_text().strip()


class Client:
    """A connection to a service, which checks that every answer is strict JSON with its length."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """POST a document, or bytes as they are; the status and the document of the answer. Without a body: GET."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        self.connection.request("GET" if content is None else "POST", path, content, headers)
        response = self.connection.getresponse()
        self.headers = response.headers
        text = response.read()
        return response.status, json.loads(text, parse_constant=refuse) if path != "/metrics" else text.decode()

    def output(self, path: str, body: Any) -> Any:
        """The output of a request that must succeed."""
        status, answer = self.ask(path, body)
        assert status == 200, answer
        assert answer.keys() == {"output"}
        return answer["output"]

    def error(self, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
        """Status, type and message of a request that must fail."""
        status, answer = self.ask(path, body, **headers)
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"type", "message"}
        return status, answer["error"]["type"], answer["error"]["message"]


def refuse(name: str) -> NoReturn:
    """Fail for a constant that is not JSON."""
    raise AssertionError(f"{name} is not JSON")


def request(model: str, **others: Any) -> dict[str, Any]:
    """A request to one of the models above."""
    inputs = [[1.0, 2.0], [3.0, 4.0, 5.0]] if model == COUPLED else [[0.5]]
    return {"name": model, "input": inputs, **others}


DERIVATIVES = {
    "/Evaluate": {},
    f"/{GRADIENT}": {"outWrt": 0, "inWrt": 1, "sens": [1.0, -1.0]},
    "/ApplyJacobian": {"outWrt": 0, "inWrt": 1, "vec": [1.0, 0.0, 2.0]},
    "/ApplyHessian": {"outWrt": 0, "inWrt1": 0, "inWrt2": 1, "sens": [1.0, -1.0], "vec": [1.0, 0.0, 2.0]},
}
"""Valid further keys of a request to `Coupled`, by path."""


@dataclass(frozen=True)
class Started:
    """A service in processes of its own: the launcher, its URL, and the file of what it prints."""

    launcher: subprocess.Popen[bytes]
    url: str
    log: Path

    def ranks(self) -> list[int]:
        """The processes of the ranks, by rank."""
        launched = str(self.log).encode()
        environments = Path("/proc").glob("[0-9]*/environ")
        found = []
        for path in environments:
            with suppress(OSError):
                environment = path.read_bytes()
                if b"SERVICE_LOG=" + launched + b"\0" in environment and b"\0PMI_RANK=" in environment:
                    rank = environment.partition(b"\0PMI_RANK=")[2].partition(b"\0")[0]
                    found.append((int(rank), int(path.parent.name)))
        return [process for _, process in sorted(found)]

    def ended(self) -> int:
        """Wait for the launcher; its exit code."""
        return self.launcher.wait(PATIENCE)


@contextmanager
def started(ranks: int, directory: Path, source: Path, *arguments: str) -> Iterator[Started]:
    """A service of so many ranks, which is ended with the context if it has not ended before."""
    url_file, log = directory / "url", directory / "service.log"
    command = [Path(sys.executable).with_name("mpiexec"), "-n", str(ranks), sys.executable, "-m", "pnode_dist.cli.main"]
    command += ["serve", source, "--port", "0", "--url-file", url_file, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SERVICE_LOG": str(log), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        launcher = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        until = time.monotonic() + PATIENCE
        while not url_file.exists():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield Started(launcher, url_file.read_text().strip(), log)
    finally:
        if launcher.poll() is None:
            launcher.terminate()
            try:
                launcher.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
