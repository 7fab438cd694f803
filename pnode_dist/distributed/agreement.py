"""Agreement of all ranks on a collective call before it begins, with a deadline on waiting for the others.

Before a collective operation whose messages depend on its arguments, the ranks reduce a fingerprint of the call on a
private communicator. If the fingerprints differ, the ranks exchange descriptions, and all raise the same
`DisagreementError`. If a rank is missing after the deadline, the waiting ranks print their places in the program and
end the job.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError, DisagreementError
from pnode_dist.system.abort import HUNG, abort

DEFAULT_TIMEOUT = 600.0
TIMEOUT_VARIABLE = "PNODE_DIST_TIMEOUT"

_MOST_NUMBERS = 12
_FAILED = 1 << 61
_LARGE_ODD = 0x9E3779B97F4A7C15
# A waiting rank tests so often without a pause, then so many seconds with yields, and then with growing sleeps.
_SPINS, _YIELDING, _LONGEST_PAUSE = 200, 2e-3, 5e-3
# Seconds for the answers of other ranks, for one of them to end the job, and for leaving together.
_FOR_OTHERS, _FOR_THE_END, _FOR_LEAVING = 2.0, 20.0, 1.0
_QUESTION, _ANSWER = 32001, 32002
_OF_THE_LIBRARY = (str(Path(__file__).parents[1]) + os.sep, str(Path(torch.__file__).parent) + os.sep)
# Errors that are raised with the same type on ranks without an error.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ConfigurationError, ValueError, TypeError, NotImplementedError)
}
# Buffers that MPI may still write to after an abandoned wait.
_unfinished: list[Any] = []


class ByRank(Protocol):
    """A fact that may differ between ranks within limits."""

    def agrees_with(self, others: Sequence[Any]) -> bool:
        """Return True if these facts of all ranks, this one included, belong to one call."""
        ...


class Pending(Protocol):
    """A pending MPI operation."""

    def Test(self) -> bool:
        """Return True if the operation is complete."""
        ...


@dataclass(frozen=True)
class Description:
    """The description of one rank's call.

    `call` is its name. `facts` are compared one by one, and shown if they differ.
    `summary` are the facts by which a reader recognises the call. `place` is the line of the program that made it.
    `failure` is the type and text of the error that prevented it on this rank. `moment` is the point at which this rank
    waits.
    """

    call: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    place: str = ""
    failure: tuple[str, str] | None = None
    moment: str = "beginning of"

    @property
    def at(self) -> str:
        """Describe the moment at which a rank waits for others."""
        return f"{self.moment} {self}"

    def __str__(self) -> str:
        remarks = "; ".join(text for text in (self.summary, self.place) if text)
        return f"{self.call} ({remarks})" if remarks else self.call


HINTS = {
    "gradient": "only some ranks need a gradient of this solve: u0 or parameters must require it on all",
}
_MISSING = (
    "every rank has to make the same solves and backward passes; a rank whose loss does not depend on the solution "
    "adds 0 * solution.sum() to it"
)


def default_timeout() -> float:
    """Return the default timeout in seconds: PNODE_DIST_TIMEOUT, or ten minutes.

    Raises `ConfigurationError` for a value that is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        return checked_timeout(float(text), TIMEOUT_VARIABLE)
    except ValueError:
        raise ConfigurationError(
            f"{TIMEOUT_VARIABLE} = {text!r}: must be a number of seconds, or 0 to wait without end"
        ) from None


def checked_timeout(seconds: float, name: str = "timeout") -> float:
    """Return `seconds` as a timeout; 0 disables it. Raises `ConfigurationError` for anything but a number."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        raise ConfigurationError(f"{name} = {seconds!r}: must be a number of seconds, or 0 to wait without end")
    return float(seconds)


@lru_cache(maxsize=256)
def digest(value: Any) -> int:
    """Return a number that is the same on all ranks for values with the same text."""
    found = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(found) & (_FAILED - 1)


def numbered(fingerprint: int, number: int) -> int:
    """Return the fingerprint of the call with this number."""
    return fingerprint ^ (number * _LARGE_ODD & (_FAILED - 1))


class Agreement:
    """The agreement of the ranks of one communicator before they begin a collective operation.

    `private` is a communicator for this alone, None until the first operation. `begun` counts the numbered operations.
    Waiting for other ranks ends the job after `timeout` seconds; 0 disables the limit.
    """

    def __init__(self, comm: MPI.Comm, timeout: float | None = None, private: MPI.Comm | None = None) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.private = private
        self.timeout = default_timeout() if timeout is None else timeout
        self.begun = 0

    def reduced(
        self,
        comm: MPI.Comm,
        fingerprint: int,
        describe: Callable[[], Description],
        numbers: Sequence[int] = (),
        failed: bool = False,
    ) -> list[int]:
        """Return the minimum of each of `numbers` over the ranks, if their fingerprints are equal. Collective.

        `comm` is the communicator of this agreement. Raises `DisagreementError` on all ranks if they make different
        calls. If some ranks `failed` to make their calls, raises an error with the text of theirs on all ranks; returns
        if all failed alike. Raises `DisagreementError` on the remaining ranks if another one has left.
        """
        if self.private is None:
            private, request = comm.Idup()
            self._complete(request, describe, private)
            self.private = private
        if failed:
            fingerprint |= _FAILED
        sent = np.zeros(3 + _MOST_NUMBERS, dtype=np.int64)
        sent[: 3 + len(numbers)] = (fingerprint, -fingerprint, 0, *numbers)
        received = np.empty_like(sent)
        request = self.private.Iallreduce(sent, received, MPI.MIN)
        self._complete(request, describe, (sent, received))
        least, most, gone, *agreed = received.tolist()
        if gone:
            raise DisagreementError(
                f"rank {-gone - 1} of {self.size} has left, and rank {self.rank} is at the {describe().at}: {_MISSING}"
            )
        if least != -most:
            self._compare(describe())
        return agreed[: len(numbers)]

    def leave(self) -> None:
        """Take part in no more operations. Other ranks get an error when they begin one. Does not wait for them."""
        if self.private is None:
            return
        sent = np.zeros(3 + _MOST_NUMBERS, dtype=np.int64)
        sent[2] = -1 - self.rank
        received = np.empty_like(sent)
        request = self.private.Iallreduce(sent, received, MPI.MIN)
        until = time.monotonic() + _FOR_LEAVING
        # Usually all ranks leave at the same time, and no message is pending.
        while not request.Test():
            if time.monotonic() > until:
                # Freed with a pending operation, a communicator of Open MPI crashes when the operation ends.
                _unfinished.append((request, sent, received, self.private))
                self.private = None
                break
            time.sleep(1e-4)

    def wait(self, request: Pending, describe: Callable[[], Description], idle: bool = True) -> None:
        """Wait for `request`, whose buffers the caller keeps, with the deadline.

        With `idle` the rank sleeps between tests. Large messages, which progress only during tests, need idle=False.
        """
        self._complete(request, describe, (), idle)

    def _complete(self, request: Pending, describe: Callable[[], Description], kept: Any, idle: bool = True) -> None:
        for _ in range(_SPINS):
            if request.Test():
                return
        try:
            self._complete_later(request, describe, idle)
        except BaseException:
            _unfinished.append((request, kept))
            raise

    def _complete_later(self, request: Pending, describe: Callable[[], Description], idle: bool) -> None:
        began = time.monotonic()
        limit, answered = self.timeout, False
        while not request.Test():
            waited = time.monotonic() - began
            if waited < _YIELDING:
                _give_way()
                continue
            if _asked() and not answered:
                # The rank that asks ends the job. If it does not, this rank does later.
                answered, limit = True, max(limit, waited + _FOR_THE_END)
                _say(self._standing(waited, describe()))
            if self.timeout > 0 and limit < waited:
                if not answered:
                    _say(self._standing(waited, describe()))
                self._end()
            if idle:
                # The delay is at most a small share of the wait.
                time.sleep(min(waited / 20, _LONGEST_PAUSE))
            else:
                _give_way()

    def _standing(self, seconds: float, description: Description) -> str:
        world = MPI.COMM_WORLD
        who = f"rank {self.rank} of {self.size}"
        if self.size != world.size:
            who += f" (rank {world.rank} of {world.size} in the job)"
        return f"{who}: waited {seconds:.3g} s at the {description.at} for the other ranks"

    def _end(self) -> NoReturn:
        """Ask the other ranks to print their places, which waiting ranks do, and end the job."""
        world = MPI.COMM_WORLD
        silent = set(range(world.size)) - {world.rank}
        questions = [world.Isend([b"", 0, MPI.BYTE], rank, _QUESTION) for rank in silent]
        until = time.monotonic() + _FOR_OTHERS
        while silent and time.monotonic() < until:
            silent -= _heard(_ANSWER)
            # A rank that asks is waiting too.
            silent -= _heard(_QUESTION)
            time.sleep(0.01)
        _unfinished.append(questions)
        if silent:
            others = ranks_in_words(sorted(silent))
            _say(
                f"no answer from {others} of {world.size}: at work elsewhere, in an operation that other ranks do not "
                f"make, or at an end; {_MISSING}"
            )
        _say(f"the limit is {self.timeout:g} s: set Mesh(timeout=...) or {TIMEOUT_VARIABLE} for another one")
        abort(HUNG, world)

    def _compare(self, mine: Description) -> None:
        """Exchange descriptions, and raise the same error on all ranks unless the descriptions agree. Collective."""
        assert self.private is not None
        gathered: list[tuple[Description, int]] = self.private.allgather((mine, self.begun))
        everyone = [each for each, _ in gathered]
        # Keep the numbers of all ranks equal, also after this error.
        self.begun = max(begun for _, begun in gathered)
        failures = [(rank, each.failure) for rank, each in enumerate(everyone) if each.failure is not None]
        if failures:
            rank, (kind, text) = failures[0]
            raise _KINDS.get(kind, DisagreementError)(f"rank {rank} of {self.size}: {text}")
        calls = [each.call for each in everyone]
        if len(set(calls)) > 1:
            raise DisagreementError(
                f"the ranks do not make the same call: {by_value([str(each) for each in everyone])}"
            )
        if found := differences(everyone):
            places = by_value([each.place for each in everyone])
            raise DisagreementError(f"{calls[0]}: the ranks differ in {'; and in '.join(found)} (called at {places})")


# Returns at once if the rank has a core of its own.
_give_way: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


def _say(line: str) -> None:
    sys.stderr.write(f"pnode_dist: {line}\n")
    sys.stderr.flush()


def _heard(tag: int) -> set[int]:
    """Receive all messages with `tag`, and return the ranks that sent them."""
    heard = set()
    status = MPI.Status()
    # A matched probe, because another thread may look at the same time.
    while (message := MPI.COMM_WORLD.Improbe(MPI.ANY_SOURCE, tag, status)) is not None:
        message.Recv([bytearray(0), 0, MPI.BYTE])
        heard.add(status.Get_source())
    return heard


def _asked() -> bool:
    """Answer other ranks that ask for this rank's place. Returns True if there were any."""
    asking = _heard(_QUESTION)
    _unfinished.extend(MPI.COMM_WORLD.Isend([b"", 0, MPI.BYTE], rank, _ANSWER) for rank in asking)
    return bool(asking)


def differences(everyone: Sequence[Description]) -> list[str]:
    """Return the facts in which the calls of the ranks differ, one text each."""
    found = []
    # A fact that only some ranks have follows from another fact.
    names = [name for name in everyone[0].facts if all(name in each.facts for each in everyone)]
    for name in names:
        values: Sequence[Any] = [each.facts[name] for each in everyone]
        first: Any = values[0]
        if hasattr(first, "agrees_with"):
            agree = all(type(value) is type(first) for value in values) and first.agrees_with(values)
        else:
            agree = all(value == first for value in values)
        if not agree:
            hint = f" ({HINTS[name]})" if name in HINTS else ""
            name, values = first_difference(name, values)
            found.append(f"{name}: {by_value([shown(value) for value in values])}{hint}")
    return found


def first_difference(name: str, values: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """Return the first difference of sequences: their lengths, or the first entries that differ."""
    if not all(isinstance(value, tuple) for value in values):
        return name, values
    if len({len(value) for value in values}) > 1:
        return f"length of {name}", [len(value) for value in values]
    position = next(n for n, entries in enumerate(zip(*values, strict=True)) if len(set(entries)) > 1)
    return f"{name}[{position}]", [value[position] for value in values]


def shown(value: Any) -> str:
    """Return a value as text for one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def by_value(texts: Sequence[str]) -> str:
    """Return the texts with their ranks: `rank 0: rk4; ranks 1, 2: dopri5`."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{ranks_in_words(numbers)}: {text}" for text, numbers in ranks.items())


def ranks_in_words(numbers: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2`, `ranks 0, 1, 2, ... (17 ranks)`."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"ranks {', '.join(map(str, numbers[:4]))}, ... ({len(numbers)} ranks)"
    return f"ranks {', '.join(map(str, numbers))}"


def place_in_program() -> str:
    """Return file and line of the innermost call from outside this package and torch, empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*_OF_THE_LIBRARY, "<")):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


# One agreement for each communicator, freed with it


def _freed(comm: MPI.Comm, keyval: int, agreement: Agreement) -> None:
    if agreement.private is not None:
        agreement.private.Free()
        agreement.private = None


_keyval = MPI.KEYVAL_INVALID


def of(comm: MPI.Comm) -> Agreement:
    """Return the agreement of the ranks of `comm`, created at the first call. It ends when `comm` is freed."""
    global _keyval
    if _keyval == MPI.KEYVAL_INVALID:
        # Duplicates of a communicator have separate agreements.
        _keyval = MPI.Comm.Create_keyval(delete_fn=_freed)
    found: Any = comm.Get_attr(_keyval)
    if found is None:
        found = Agreement(comm)
        comm.Set_attr(_keyval, found)
    agreement: Agreement = found
    return agreement


def set_timeout(comm: MPI.Comm, seconds: float) -> None:
    """Limit the wait for other ranks of `comm` at the beginning of solves and backward passes; 0 disables the limit.

    A `Mesh` sets its own timeout for its state ranks. Raises `ConfigurationError` for anything but a number of seconds.
    """
    of(comm).timeout = checked_timeout(seconds)


def join(comm: MPI.Comm, seconds: float) -> None:
    """Prepare agreements with a timeout on `comm`. Collective."""
    found = of(comm)
    found.timeout = checked_timeout(seconds)
    if comm.size > 1 and found.private is None:
        found.private = comm.Dup()
