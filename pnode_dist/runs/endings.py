"""How a training run ends before its last epoch. All of these are raised on all ranks alike."""

from __future__ import annotations


class DivergenceError(RuntimeError):
    """The loss, its gradient or a parameter is not finite; the message names the step, and the ranks it comes from."""


class RunDirectoryError(RuntimeError):
    """The run directory takes no more: the disk is full, or it is not there any more."""


class Preempted(Exception):  # noqa: N818
    """The run was asked to stop, and has left a snapshot to go on from."""
