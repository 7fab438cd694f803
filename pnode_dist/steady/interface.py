"""Steady states as functions of the parameters of f."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.steppers.base import PetscOptions
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.partition.protocol import Partition
from pnode_dist.steady.implicit_function import find
from pnode_dist.steady.settings import SteadySettings


def steady_state(
    func: Function,
    u0: State,
    *,
    args: tuple[Any, ...] = (),
    partition: Partition | None = None,
    t: float = 0.0,
    params: Sequence[torch.Tensor] | None = None,
    solver: str = "newtonls",
    preconditioner: Preconditioner | str | None = None,
    rtol: float | None = None,
    atol: float = 1e-50,
    stol: float | None = None,
    max_it: int | None = None,
    step_size: float | None = None,
    deflate: State | Sequence[State] = (),
    phase: State | Sequence[State] = (),
    compute_dtype: torch.dtype | None = None,
    options: PetscOptions | None = None,
) -> Any:
    """Return u with func(t, u, *args) = 0, found from `u0`; differentiable in func's parameters and in `args`.

    Collective on the partition's communicator, and so is the backward pass. `func`, `u0`, `args`, `partition`,
    `params`, `preconditioner` and `compute_dtype` are those of `odeint`. All settings are described by the fields of
    `pnode_dist.steady.SteadySettings`. `pnode_dist.steady.find` returns the counts of the solve as well.

    Solve
        `solver` is Newton's method with a line search, `newtonls`, or a trust region, `newtontr`, or pseudo-transient
        continuation, `pseudo`, which follows du/dt = f with ever longer implicit steps. Jacobians are products of
        vectors with derivatives of func. The linear systems are solved by GMRES, with `preconditioner` at shift 0. A
        solve ends when the 2-norm of f over all ranks is below `rtol` times that at `u0`, or below `atol`, or after a
        Newton step below `stol` times the norm of u. `max_it` limits the iterations.

    Several steady states
        `deflate` holds known ones: the solve is for M(u) f(u) = 0 with M(u) = prod_r (1 / |u - r|^2 + 1), where |.| is
        the root mean square. The same `u0` then leads to another one, if there is one in reach. `newtonls` takes full
        steps.

    Symmetric f
        The Jacobian is singular where f has a continuous symmetry, such as translations. `phase` fixes it by the
        conditions <v, u - u0> = 0, in place of the components of f along v. v must not be orthogonal to the tangent of
        the symmetry at u: its value at `u0` is a good choice. In the end f must be 0 along v, up to 1000 `rtol` of |f|
        at `u0`, `atol` and rounding. Otherwise the state is refused.

    Gradient
        The gradient takes one transposed linear solve, by GMRES with the same preconditioner, at the tolerance `rtol`,
        and is exact up to the residuals of both solves. A linear residual above both 100 `rtol` and 1e-9 is refused.
        The graph of one evaluation of func is kept, and nothing of the iterations. The gradient with respect to `u0`,
        `deflate` and `phase` is zero. Gradients with respect to parameters are this rank's contributions, as those of
        `odeint` are. Second derivatives are refused.

    Raises `ConfigurationError` for a setting that is not allowed; `ConvergenceError` if the equations or those of the
    gradient are not solved; `DisagreementError` if the ranks make different calls; `ValueError` and `TypeError` for a
    value of func that is not like the state.
    """
    settings = SteadySettings(
        partition=partition,
        t=t,
        params=params,
        solver=solver,
        preconditioner=preconditioner,
        rtol=rtol,
        atol=atol,
        stol=stol,
        max_it=max_it,
        step_size=step_size,
        deflate=deflate,
        phase=phase,
        compute_dtype=compute_dtype,
        options=options,
    )
    return find(func, u0, settings, args=args).u
