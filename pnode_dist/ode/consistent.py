"""Consistent initial values of a semi-explicit DAE: values that satisfy its algebraic equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import odeint
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import State, layout_of
from pnode_dist.ode.rhs.mass import Mass, mass_matrix
from pnode_dist.ode.steppers.base import PetscOptions
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.partition.protocol import Partition


def _algebraic_equations(func: Function, time: float, algebraic: tuple[torch.Tensor, ...]) -> Function:
    """Return the right-hand side -f(t_0, u) in the algebraic rows, and zero in the others.

    With the mass matrix 0 in the algebraic rows and 1 in the others, an implicit Euler step of length 1 keeps the
    differential components and solves f = 0 for the algebraic ones.
    """

    # A closure, in which torch's transforms find the parameters of func.
    def equations(t: torch.Tensor, u: State, *args: Any) -> State:
        values = func(torch.full_like(t, time), u, *args)
        parts = values if isinstance(values, tuple | list) else (values,)
        kept = tuple(-part * mask.to(part.device) for part, mask in zip(parts, algebraic, strict=True))
        return kept if isinstance(u, tuple) else kept[0]

    return equations


def consistent(
    func: Function,
    u0: State,
    t0: float,
    mass: Mass,
    *,
    partition: Partition | None = None,
    args: tuple[Any, ...] = (),
    params: Sequence[torch.Tensor] | None = None,
    options: PetscOptions | None = None,
    preconditioner: Preconditioner | str | None = None,
) -> Any:
    """Replace the algebraic components of `u0`, so that the algebraic equations of M du/dt = func(t, u) hold at `t0`.

    The zero rows of M are the algebraic equations 0 = func. They are solved for the components of the same numbers, by
    Newton's method from those of `u0`. The result is differentiable in the differential components of
    `u0` and in func's parameters, by the implicit function theorem. The other arguments are those of `odeint`.
    Collective on the partition's communicator.

    Raises `ConfigurationError` if M has no row of zeros, and `ConvergenceError` if the equations cannot be solved.
    """
    layout, parts = layout_of(u0)
    matrix = mass_matrix(mass, layout)
    if matrix is None or not (bool(matrix.algebraic.any()) or partition is not None):
        raise ConfigurationError("mass: has no row of zeros: there are no algebraic equations to be consistent with")
    masks = tuple(mask.to(layout.dtype) for mask in layout.parts(matrix.algebraic))
    differential = tuple(1 - mask for mask in masks)
    equations = _algebraic_equations(func, float(t0), masks)
    solved = odeint(
        equations,
        u0 if layout.is_tuple else parts[0],
        [0.0, 1.0],
        method="beuler",
        step_size=1.0,
        mass=differential if layout.is_tuple else differential[0],
        partition=partition,
        args=args,
        params=params,
        options=options,
        preconditioner=preconditioner,
    )
    return tuple(part[-1] for part in solved) if layout.is_tuple else solved[-1]
