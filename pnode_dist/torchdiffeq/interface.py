"""`odeint` and `odeint_adjoint` with the signatures of torchdiffeq."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import State
from pnode_dist.partition.protocol import Partition
from pnode_dist.torchdiffeq.solve import Call, solved

Function = Callable[..., Any]
Tolerance = float | torch.Tensor | Iterable[float | torch.Tensor]


def odeint(
    func: Function,
    y0: State,
    t: torch.Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Function | None = None,
    partition: Partition | None = None,
    trajectory: CheckpointBudget | None = None,
) -> Any:
    """Solve dy/dt = func(t, y) from y(t[0]) = y0, like `torchdiffeq.odeint`; differentiable in y0, parameters and t.

    Returns `[len(t), *y0.shape]`, or a tuple of such tensors if y0 is a tuple. `rtol` and `atol` are numbers, tensors
    that broadcast to y0, or one of these for each part of a tuple. `method` is a name of torchdiffeq's, by default the
    adaptive `dopri5`. `options` are those of torchdiffeq for the method. Tensors that func computes with get the
    gradient of the steps taken.

    Methods with given steps take those of `options` and do not use the tolerances.

    With `event_fn` the solve goes on from `t[0]`, in the direction of t, until an entry of `event_fn(t, y)` changes its
    sign. Returns the time of the event, 0-dimensional, and the states at `t[0]` and there, `[2, *y0.shape]`. Both are
    differentiable, the time by the implicit function theorem.

    `partition` and `trajectory` are those of `pnode_dist.odeint`: y0 is this rank's part of the state, and checkpoints
    stay within a budget. Collective on the partition's communicator.

    Raises `ConfigurationError` for a method, an option or a callback that is not supported, with what to use instead;
    `EventError` if there is no event; otherwise like `pnode_dist.odeint`.
    """
    return solved(Call(func, y0, t, rtol, atol, method, options, partition, trajectory, event_fn))


def odeint_adjoint(
    func: Function,
    y0: State,
    t: torch.Tensor,
    *,
    rtol: Tolerance = 1e-7,
    atol: Tolerance = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Function | None = None,
    adjoint_rtol: Tolerance | None = None,
    adjoint_atol: Tolerance | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[torch.Tensor] | None = None,
    partition: Partition | None = None,
    trajectory: CheckpointBudget | None = None,
) -> Any:
    """Solve like `odeint`, with the arguments of `torchdiffeq.odeint_adjoint`.

    The gradient is that of `odeint`: exact for the steps of the forward pass, in the memory of `trajectory`. No adjoint
    equation is solved, so a warning reports that its settings (`adjoint_rtol`, `adjoint_atol`, `adjoint_method`,
    `adjoint_options`) have no effect. `adjoint_params` are the tensors that get a gradient besides y0 and t, by default
    the parameters of the module func.

    Raises `ConfigurationError` like `odeint`, for a func that is no module without `adjoint_params`, for
    `adjoint_params` that leave out a parameter of func.

    The callbacks `callback_step_adjoint` and `callback_accept_step_adjoint` of func are called after a backward
    pass for each step in its order, with its start, None, and its size.
    """
    without_effect = {
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
    }
    given = [name for name, value in without_effect.items() if value is not None]
    if given:
        warnings.warn(
            f"{', '.join(given)}: no effect: the gradient is exact for the steps of the forward pass, and no adjoint "
            "equation is solved",
            UserWarning,
            stacklevel=2,
        )
    call = Call(func, y0, t, rtol, atol, method, options, partition, trajectory, event_fn, True, adjoint_params)
    return solved(call)


def odeint_event(
    func: Function,
    y0: State,
    t0: torch.Tensor,
    *,
    event_fn: Function,
    reverse_time: bool = False,
    odeint_interface: Function = odeint,
    **kwargs: Any,
) -> Any:
    """Solve from `t0` until `event_fn(t, y)` is zero, like `torchdiffeq.odeint_event`.

    Returns the time of the event and the states at `t0` and there, `[2, *y0.shape]`, both differentiable.
    `odeint_interface` is `odeint` or `odeint_adjoint` of this module, which get `kwargs`.

    Raises `ConfigurationError` for another interface, whose event times may have no gradient; otherwise like `odeint`.
    """
    if odeint_interface not in (odeint, odeint_adjoint):
        raise ConfigurationError(
            f"odeint_interface = {odeint_interface!r}: must be odeint or odeint_adjoint of pnode_dist.torchdiffeq"
        )
    if not isinstance(t0, torch.Tensor) or t0.numel() != 1:
        raise ConfigurationError(f"t0 = {t0!r}: must be a tensor with one time")
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
