"""The key of a solver in its cache: a call may reuse a solver that was made of the same objects with the same contents.

The key holds its objects. A key of `id` numbers alone could match another object after the first one is freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.ode.repeated import Repeated
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction
from pnode_dist.ode.rhs.tangent import WithTangent
from pnode_dist.ode.steppers.preconditioner import AssembledJacobian, BlockInverse


class Same:
    """An object as part of a key. The key holds it, and it is equal to itself alone."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held


def object_key(func: Any, mass: Any, preconditioner: Any) -> tuple[Any, ...]:
    """Return the part of a solver's key for the objects that it is made of; empty if there are none.

    Different sequences of the same mass tensors are equal. So are equal descriptions of built-in preconditioners.
    """
    mats = matrices_of(func)
    if mass is None and preconditioner is None and not mats:
        return ()
    described = _description(preconditioner)
    return (tuple(map(Same, _in_sequence(mass))), described, tuple(map(Same, mats)))


def _description(preconditioner: Any) -> Any:
    if isinstance(preconditioner, Repeated):
        base = preconditioner.base
        of_base = Same(base.matrix) if isinstance(base, MatrixFunction) else _description(base)
        return of_base, preconditioner.copies, preconditioner.is_tuple, repr(preconditioner.options)
    ours = isinstance(preconditioner, BlockInverse | AssembledJacobian)
    return preconditioner if ours else Same(preconditioner)


def matrices_of(func: Any) -> tuple[PETSc.Mat, ...]:
    """Return the Mats that are a right-hand side or a part of it, also below tangents."""
    while isinstance(func, WithTangent):
        func = func.func
    if isinstance(func, SplitFunction):
        return (*matrices_of(func.implicit), *matrices_of(func.explicit))
    return (func.matrix,) if isinstance(func, MatrixFunction) else ()


@dataclass(frozen=True)
class Contents:
    """The contents of the objects of a key at the time when the solver was made, if they can change in place.

    `tensors` are those of the mass matrix, with copies. `mats` are Mats, with PETSc's counters of their changes.
    `attributes` are those of a preconditioner's description.
    """

    tensors: tuple[tuple[Any, torch.Tensor], ...] = ()
    mats: tuple[tuple[PETSc.Mat, int], ...] = ()
    described: Any = None
    attributes: tuple[tuple[str, Same], ...] = ()

    @property
    def are_the_same(self) -> bool:
        """True if nothing has changed since."""
        return (
            all(torch.equal(torch.as_tensor(now), then) for now, then in self.tensors)
            and self.mats_are_the_same
            and _attributes(self.described) == self.attributes
        )

    @property
    def mats_are_the_same(self) -> bool:
        """True if no Mat has changed since. The same on all ranks of the Mats."""
        return all(mat.stateGet() == state for mat, state in self.mats)


def contents_of(func: Any, mass: Any, preconditioner: Any) -> Contents | None:
    """Return the contents of the objects of a solver; None if none can change. Not collective."""
    masses = _in_sequence(mass)
    mats = [*(part for part in masses if isinstance(part, PETSc.Mat)), *matrices_of(func)]
    # Numbers are compared by value.
    tensors = [part for part in masses if not isinstance(part, PETSc.Mat | int | float)]
    while isinstance(preconditioner, Repeated):
        preconditioner = preconditioner.base
    attributes = _attributes(None if isinstance(preconditioner, MatrixFunction) else preconditioner)
    if not (mats or tensors or attributes):
        return None
    return Contents(
        tuple((tensor, torch.as_tensor(tensor).detach().clone()) for tensor in tensors),
        tuple((mat, mat.stateGet()) for mat in mats),
        preconditioner if attributes else None,
        attributes,
    )


def check_unchanged(contents: Contents | None) -> None:
    """Raise `RuntimeError` if a Mat of the forward pass has changed since. Raises on all ranks alike."""
    if contents is not None and not contents.mats_are_the_same:
        raise RuntimeError(
            "a PETSc.Mat of the solve (its mass matrix, or a linear part of func) was changed in place between the "
            "forward pass and its backward pass: change a copy of it, or solve again"
        )


def _in_sequence(mass: Any) -> tuple[Any, ...]:
    if mass is None:
        return ()
    return tuple(mass) if isinstance(mass, tuple | list) else (mass,)


def _attributes(described: Any) -> tuple[tuple[str, Same], ...]:
    return (
        tuple((name, Same(value)) for name, value in vars(described).items()) if hasattr(described, "__dict__") else ()
    )
