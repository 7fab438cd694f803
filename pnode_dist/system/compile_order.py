"""Compilation by one rank of a node, whose results the others find in the cache.

torch.compile stores what it makes in a folder of the node (`TORCHINDUCTOR_CACHE_DIR`, by default a folder of the user
in the folder for temporary files). Ranks that begin together find nothing there, and all of them compile the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpi4py import MPI

_PAUSE = 0.01
_rehearsals = 0


@contextmanager
def rehearsal() -> Iterator[None]:
    """Let exchanges in compiled code return zeros, without communication. Not collective.

    Code that is called for the first time is then compiled by this rank alone. Exchanges outside compiled code raise
    `RuntimeError`.
    """
    global _rehearsals
    _rehearsals += 1
    try:
        yield
    finally:
        _rehearsals -= 1


def is_rehearsal() -> bool:
    """Return True within `rehearsal`."""
    return _rehearsals > 0


def refuse_in_rehearsal() -> None:
    """Raise `RuntimeError` within `rehearsal`, where an exchange would wait for ranks that do not take part."""
    if _rehearsals:
        raise RuntimeError("rehearsal: an exchange between ranks is outside compiled code: must be inside, or left out")


def compile_in_turn(call: Callable[[], object], comm: MPI.Comm, deadline: float = 600.0) -> None:
    """Compile what `call` runs: on the first rank of each node, then on its other ranks. Collective on `comm`.

    `call` runs in `rehearsal`: it must call compiled functions alone, forward and backward as later code will, and its
    results have no meaning. Ranks whose tensors have the shapes of the first rank's find the result in the node's
    cache. Raises the error of the first failing rank on all ranks, as `RuntimeError` on the others, and `TimeoutError`
    on ranks that waited for longer than `deadline` seconds.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # Abandoned messages of a rank that gave up must not meet those of a later call.
    everywhere = comm.Dup()
    error: Exception | None = None
    if node.rank == 0:
        error = _error_of(call)
    _wait(node.Ibarrier(), deadline, "the first rank of the node compiles")
    if node.rank > 0:
        error = _error_of(call)
    _wait(everywhere.Ibarrier(), deadline, "other ranks compile")
    errors = everywhere.allgather(None if error is None else f"{type(error).__name__}: {error}")
    node.Free()
    everywhere.Free()
    if error is not None:
        raise error
    failed = [rank for rank, text in enumerate(errors) if text is not None]
    if failed:
        raise RuntimeError(f"compilation failed on rank {failed[0]}: {errors[failed[0]]}")


def _error_of(call: Callable[[], object]) -> Exception | None:
    try:
        with rehearsal():
            call()
    except Exception as error:
        return error
    return None


def _wait(request: MPI.Request, deadline: float, reason: str) -> None:
    """Wait without occupying the core, which a compiler needs."""
    end = time.monotonic() + deadline
    while not request.Test():
        if time.monotonic() > end:
            raise TimeoutError(f"{reason}, for longer than the deadline of {deadline:g} seconds")
        time.sleep(_PAUSE)
