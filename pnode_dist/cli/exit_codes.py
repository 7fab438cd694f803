"""The exit codes of the command line, in one table."""

from __future__ import annotations

import signal

from pnode_dist.system.abort import HUNG

DONE, FAILED, WRONG_USAGE, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130
CLOSED_PIPE = 128 + signal.SIGPIPE

MEANINGS = {
    DONE: "done",
    FAILED: "a check or a run failed: a loss that is not finite, a solver without a solution, a full disk",
    WRONG_USAGE: "wrong usage or configuration, a run directory that another run uses",
    HUNG: "the job hung",
    PREEMPTED: "stopped, with a snapshot: start it again with `--resume auto`",
    INTERRUPTED: "interrupted",
    CLOSED_PIPE: "the reader of the output closed it, as `head` does",
}
"""docs/reference/exit_codes.md shows the same table."""

ALWAYS = (DONE, WRONG_USAGE, INTERRUPTED, CLOSED_PIPE)
"""The codes of every command."""
