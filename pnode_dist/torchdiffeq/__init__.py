"""torchdiffeq's functions, with its signatures, defaults and method names, on this package's solver.

A program changes its import line alone: `from pnode_dist.torchdiffeq import odeint_adjoint as odeint`.
"""

from __future__ import annotations

from pnode_dist.torchdiffeq.interface import odeint as odeint
from pnode_dist.torchdiffeq.interface import odeint_adjoint as odeint_adjoint
from pnode_dist.torchdiffeq.interface import odeint_event as odeint_event
from pnode_dist.torchdiffeq.unsupported import odeint_dense as odeint_dense

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
