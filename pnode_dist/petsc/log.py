"""Events and stages of a solve in PETSc's log, which `-log_view` lists with their counts and times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from petsc4py import PETSc

FORWARD_PASS, BACKWARD_PASS = "pnode forward", "pnode backward"
FUNCTION, PRODUCT = "pnode f", "pnode vjp"
STEP, RECOMPUTE, ADJOINT_STEP, CHECKPOINT = "pnode step", "pnode recompute", "pnode adjoint", "pnode chkpoint"

_NOTHING = nullcontext()


@cache
def _event(name: str) -> Any:
    return PETSc.Log.Event(name)


@cache
def _stage(name: str) -> Any:
    return PETSc.Log.Stage(name)


def logging() -> bool:
    """Return True if PETSc's log is active. Called once for a solve: an event takes as long as a small stage."""
    return bool(PETSc.Log.isActive())


@contextmanager
def _begun(name: str) -> Iterator[None]:
    event = _event(name)
    event.begin()
    try:
        yield
    finally:
        event.end()


@contextmanager
def _entered(name: str) -> Iterator[None]:
    entered = _stage(name)
    entered.push()
    try:
        yield
    finally:
        entered.pop()


def stage(name: str, active: bool) -> Any:
    """Return a context that is a stage of the log, if `active`."""
    return _entered(name) if active else _NOTHING


def event(name: str, active: bool) -> Any:
    """Return a context that is an event of the log, if `active`."""
    return _begun(name) if active else _NOTHING
