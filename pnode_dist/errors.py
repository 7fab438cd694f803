"""The one exception that means: what the user asked for cannot be done as asked."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """A wrong configuration, option or command.

    Its message is one line that names what is wrong and what is allowed. The command line prints it on rank 0 and
    ends with exit code 2. Where the ranks are already connected it is raised on all of them alike.
    """


class StepSizeError(ArithmeticError):
    """Steps with error control became too small to go on. Raised on all ranks alike, in one line."""


class ConvergenceError(ArithmeticError):
    """A nonlinear or linear solve did not converge. Raised on all ranks alike, in one line with PETSc's reason."""


class EventError(ArithmeticError):
    """Events of a solve follow one another without end, or one has no time that can be used.

    Raised on all ranks alike, in one line with the time and the number of events so far.
    """


class RecomputationError(RuntimeError):
    """A step that was recomputed for the gradient differs from the forward pass. Raised on all ranks alike."""


class DisagreementError(RuntimeError):
    """The ranks do not make the same collective call. Raised on all ranks alike, in one line with what differs."""
