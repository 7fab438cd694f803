"""Exceptions that end a training run before its last epoch. Each is raised on all ranks."""

from __future__ import annotations


class DivergenceError(RuntimeError):
    """The loss, its gradient or a parameter is not finite; the message names the step and the originating ranks."""


class RunDirectoryError(RuntimeError):
    """The run directory cannot be written, because the disk is full or the directory was removed."""


class Preempted(Exception):  # noqa: N818
    """The run stopped on request, after writing a snapshot to resume from."""
