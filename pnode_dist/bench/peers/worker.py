"""A solver's process, as the comparison sees it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pnode_dist.bench.peers.cases import DIFFRAX, PYQG

_TIMEOUT = 1800.0
"""Seconds that the longest answer may take: a first call compiles."""


def is_of_jax(solver: str) -> bool:
    """Return True for a solver in the environment of JAX."""
    return solver.startswith(DIFFRAX) or solver == PYQG


class WorkerError(Exception):
    """A solver that cannot compute a case, with its reason."""


@dataclass
class Worker:
    """A process that solves one case by one solver on one core. Use as a context manager.

    Raises `WorkerError` if the process reports an error, ends, or does not answer in time.
    """

    case: str
    solver: str
    python: Path
    core: int
    process: subprocess.Popen[str] = field(init=False)
    errors: IO[str] = field(init=False)

    def __enter__(self) -> Worker:
        # diffrax's environment has no pnode_dist to find the module in.
        program = [str(Path(__file__).with_name("jax_worker.py"))]
        if not is_of_jax(self.solver):
            program = ["-m", "pnode_dist.bench.peers.torch_worker"]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [self.python, *program, self.case, self.solver, str(self.core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
        )
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            stream.close()

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request of `serving` and return the answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stream = self.process.stdout
        assert stream is not None
        if not select.select([stream], [], [], _TIMEOUT)[0]:
            raise WorkerError(f"no answer within {_TIMEOUT:.0f} s")
        line = stream.readline()
        if not line:
            raise WorkerError(f"ended without an answer: {self._said()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _said(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1] if lines else f"exit code {self.process.wait()}"
