"""The settings of a solve: the keyword arguments of `odeint`, which `NeuralODE` stores as attributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.checkpointing.plan import Plan
from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.mass import Mass
from pnode_dist.ode.steppers.base import PetscOptions
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.ode.steppers.step_rule import NO_CALLBACKS, StepCallbacks, StepRule
from pnode_dist.ode.steppers.tolerances import DEFAULT_ATOL, DEFAULT_RTOL, ErrorControl, Tolerance
from pnode_dist.ode.time_grid import TimeGrid
from pnode_dist.partition.protocol import Partition

WITHOUT_ARGUMENT = ("grid", "rule", "callbacks", "compared")
"""The settings, the last ones, that are no arguments of `odeint`."""
Times = torch.Tensor | Sequence[float]


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `odeint`, see there, and settings without one.

    `grid` are the steps, in place of `step_size`. `rule` chooses the sizes of steps with error control, in place of
    PETSc's `adaptor`. `callbacks` are called at each step. `compared` are the names and values of further
    settings of the caller, which must be equal on all ranks.
    """

    method: str | None
    step_size: float | None
    rtol: Tolerance | None
    atol: Tolerance | None
    adaptor: str
    partition: Partition | None
    trajectory: CheckpointBudget | None
    params: Sequence[torch.Tensor] | None
    options: PetscOptions | None
    mass: Mass | None = None
    preconditioner: Preconditioner | str | None = None
    compute_dtype: torch.dtype | None = None
    last_only: bool = False
    on_mismatch: str = "raise"
    preserve_rng_state: bool = True
    newton: str = "auto"
    fixed_plan: Plan | None = None
    compiler: Compiler | None = None
    grid: TimeGrid | None = None
    rule: StepRule | None = None
    callbacks: StepCallbacks = NO_CALLBACKS
    compared: tuple[tuple[str, Any], ...] = ()

    def control(self) -> ErrorControl | None:
        """Return the error control; None for steps of fixed size."""
        if self.rtol is None and self.atol is None:
            return None
        rtol = DEFAULT_RTOL if self.rtol is None else self.rtol
        atol = DEFAULT_ATOL if self.atol is None else self.atol
        return ErrorControl(rtol, atol, self.adaptor, self.step_size, self.rule, self.callbacks)
