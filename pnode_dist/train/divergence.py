"""The error of a training run that left the numbers behind."""

from __future__ import annotations


class DivergenceError(RuntimeError):
    """The loss or its gradient is not finite. Raised on all ranks alike; the message names the step."""
