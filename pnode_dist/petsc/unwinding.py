"""PETSc's return from a callback that has raised an exception, through all of its calls to the one from Python.

Python must collect no garbage meanwhile: petsc4py writes a line of its traceback at each of PETSc's calls, and with
petsc4py 3.22 on Python 3.13 the process crashes if a collection comes between.
"""

from __future__ import annotations

import gc

_paused = False


def begin(error: BaseException) -> BaseException:
    """Pause the automatic collection of garbage until `end`. Returns the exception, which the callback then raises."""
    global _paused
    if gc.isenabled():
        gc.disable()
        _paused = True
    return error


def end() -> None:
    """Resume the collection if `begin` has paused it. Called when PETSc has returned."""
    global _paused
    if _paused:
        _paused = False
        gc.enable()
