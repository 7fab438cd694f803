"""Trains a configuration on the ranks of an MPI job, one of which kills itself in a phase of a step.

    mpirun -n 2 python killed_rank.py PHASE CONFIG RUN_DIR

The phase is one of the second optimiser step that this job takes, the writing of its second snapshot, or `none`.
RUN_DIR.died is made just before.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pnode_dist.cli.main import main
from pnode_dist.distributed.mpi_backend import MPIProcessGroup
from pnode_dist.problems.field.model import Tendency
from pnode_dist.runs.snapshot_files import Background
from pnode_dist.system import scratch
from tests.conftest import started_and_waited_for

FORWARD, BACKWARD, SUM, WRITING = "forward", "backward", "gradient sum", "snapshot"
NONE = "none"
WRITER, OTHER = 0, 1
KILLED = {FORWARD: OTHER, BACKWARD: OTHER, SUM: OTHER, WRITING: WRITER}
"""The rank that kills itself, by the phase."""

_steps = 0


def die(*_: Any) -> None:
    Path(sys.argv[3]).with_suffix(".died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def count(*_: Any) -> None:
    global _steps
    _steps += 1


def in_right_hand_side(action: Callable[[torch.Tensor], Any], differentiated: bool) -> None:
    """Do `action` with a value of the right-hand side after the first step, if need be with one that has a graph."""
    evaluations = 0

    def evaluated(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal evaluations
        if isinstance(module, Tendency) and _steps and output.requires_grad >= differentiated:
            evaluations += 1
            if evaluations == 3:
                action(output)

    register_module_forward_hook(evaluated)


def in_sum_of_gradients() -> None:
    """Die where the others wait for this rank's share of the gradient."""
    honest = MPIProcessGroup.allreduce

    def allreduce(group: MPIProcessGroup, tensors: list[torch.Tensor], options: Any = None) -> Any:
        # The bucket of DistributedDataParallel, and not the few numbers of a step.
        if _steps and sum(tensor.numel() for tensor in tensors) > 50:
            die()
        return honest(group, tensors, options)

    MPIProcessGroup.allreduce = allreduce  # type: ignore[method-assign]


def in_snapshot() -> None:
    """Die when the second snapshot is written, and does not have its name yet."""
    honest, seen = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal seen
        seen += Path(target).match("step-*.pt")
        if seen == 2:
            die()
        honest(source, target)

    os.replace = replace


if __name__ == "__main__":
    phase, config, run = sys.argv[1:]
    register_optimizer_step_post_hook(count)
    # So that every job gets on.
    Background.start = started_and_waited_for  # type: ignore[method-assign]
    scratch._GRACE = 0.5
    if MPI.COMM_WORLD.rank == KILLED.get(phase):
        {
            FORWARD: lambda: in_right_hand_side(die, differentiated=False),
            BACKWARD: lambda: in_right_hand_side(lambda value: value.register_hook(die), differentiated=True),
            SUM: in_sum_of_gradients,
            WRITING: in_snapshot,
        }[phase]()
    sys.exit(main(["train", config, "--run-dir", run, "--resume", "auto", "--set", "training.epochs=2"]))
