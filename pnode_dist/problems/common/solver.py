"""Solves as the tables [solver] and [trajectory] configure them, and checks of their budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mpi4py import MPI

from pnode_dist.checkpointing.budget import Trajectory, agree_on_slots
from pnode_dist.ode.methods import resolve
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import StateLayout, for_method
from pnode_dist.ode.rhs.mass import Mass
from pnode_dist.ode.steppers.preconditioner import AssembledJacobian
from pnode_dist.ode.time_grid import time_grid
from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition

if TYPE_CHECKING:
    from pnode_dist.config.tables import Config


def neural_ode(
    config: Config,
    right_hand_side: Function,
    partition: Partition | None,
    mass: Mass | None = None,
    trajectory: Trajectory | None = None,
    last_only: bool = False,
    between_steps: Callable[..., Any] | None = None,
) -> NeuralODE:
    """The configured solve of `right_hand_side`, M du/dt = f if there is a `mass`, on the partition.

    Solves that are to share the configured budget are given the same `trajectory`. `last_only` and
    `between_steps` as `NeuralODE` takes them.
    """
    solver = config.solver
    return NeuralODE(
        right_hand_side,
        method=solver.method,
        step_size=solver.step_size,
        rtol=solver.rtol,
        atol=solver.atol,
        adaptor=solver.adaptor,
        pcoeff=solver.pcoeff,
        icoeff=solver.icoeff,
        dcoeff=solver.dcoeff,
        first_step=solver.first_step,
        dt_min=solver.dt_min,
        dt_max=solver.dt_max,
        max_steps=solver.max_steps,
        partition=partition,
        trajectory=config.trajectory.build() if trajectory is None else trajectory,
        options=solver.options,
        mass=mass,
        preconditioner=(
            AssembledJacobian(solver.reach) if solver.preconditioner == "assembled" else solver.preconditioner
        ),
        compute_dtype=_torch_type(solver.compute_dtype),
        state_dtype=_state_dtype(config),
        last_only=last_only,
        between_steps=between_steps,
        on_mismatch=solver.on_mismatch,
        preserve_rng_state=solver.preserve_rng_state,
        newton=solver.newton,
        jumps=solver.jumps or None,
        compile=solver.compile,
    )


def check_budget(config: Config, partition: Partition, dtype: torch.dtype, interval: float, window: int) -> None:
    """Raise `ConfigurationError` if no checkpoint of a batch of windows fits the trajectory. Collective on the
    partition's communicator.

    A window has `window` output times, `interval` apart in the problem's time units. A replica has its share of them.
    The states given to the solve are of type `dtype`.
    """
    share = math.ceil(config.training.batch_size / config.mesh.data)
    values = share * protocol.count(partition.local_shape)
    check_checkpoint(config, values, dtype, [number * interval for number in range(window + 1)], partition.comm)


def check_checkpoint(
    config: Config, values: int, dtype: torch.dtype, times: Sequence[float], comm: MPI.Comm, solves: int = 1
) -> None:
    """Raise `ConfigurationError` if no checkpoint of a state with so many `values` on this rank fits the trajectory of
    its solve for `times`, where so many `solves` of a model share it. Collective on `comm`.

    The states given to the solve are of type `dtype`.
    """
    trajectory, solver = config.trajectory.build(solves), config.solver
    given = StateLayout(((values,),), dtype, is_tuple=False, compute_dtype=_torch_type(solver.compute_dtype) or dtype)
    layout = for_method(given, resolve(solver.method), _state_dtype(config))
    checkpoint = values * trajectory.slot_dtype(layout.numpy_dtype).itemsize
    adaptive = solver.rtol is not None or solver.atol is not None
    steps = None if adaptive else time_grid(times, solver.step_size).steps
    agree_on_slots(trajectory, checkpoint, steps, True, comm)


def _state_dtype(config: Config) -> torch.dtype | None:
    return None if config.solver.state_dtype == "auto" else _torch_type(config.solver.state_dtype)


def _torch_type(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
