"""Messages between two ranks as torch.distributed's `Work`."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from pnode_dist.distributed.buffers import store


class Message(dist.Work):
    """A message to or from another rank, which completes in `wait`."""

    def __init__(self, request: MPI.Request, values: torch.Tensor, target: torch.Tensor | None, wait: Any) -> None:
        super().__init__()
        self._request, self._values, self._target, self._wait = request, values, target, wait
        self._status = MPI.Status()
        self._complete = False

    def Test(self) -> bool:
        """Return True if the message is complete, as a request for `Agreement.wait`."""
        if not self._complete and self._request.Test(self._status):
            self._complete = True
            if self._target is not None:
                store(self._target, self._values)
        return self._complete

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Complete the message. After `timeout`, unless it is 0, raises `TimeoutError`."""
        if not timeout:
            self._wait(self)
            return True
        until = time.monotonic() + timeout.total_seconds()
        while not self.Test():
            if time.monotonic() > until:
                raise TimeoutError(f"a message is not complete after {timeout.total_seconds():g} s")
            time.sleep(0)
        return True

    def is_completed(self) -> bool:
        return self.Test()

    def is_success(self) -> bool:
        return self.Test()

    def _source_rank(self) -> int:
        return int(self._status.Get_source())
