"""Preconditioners for the linear systems shift M - dg/du of implicit steps and, transposed, of their adjoints.

`odeint` takes a small description of a preconditioner. The description builds either a Mat, which a PC of PETSc's is
made from, or a PC itself. The preconditioner is updated at the beginning of every step, at the state there, and kept
for the step's stages and Newton iterations as long as the linear solves are short. Because each step begins with an
update, a recomputed step has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.ode.rhs.mass import MassMatrix
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition
from pnode_dist.partition.stencil_jacobian import StencilJacobian
from pnode_dist.petsc import vectors

NAMES = ("none", "block", "assembled")


@dataclass(frozen=True)
class Setting:
    """The context of a preconditioner: the ranks, the layout of the state, and M (None: the identity)."""

    comm: MPI.Comm
    layout: StateLayout
    partition: Partition | None
    mass: MassMatrix | None


class Built(Protocol):
    """A preconditioner in use.

    `matrix` is the Mat that PETSc's PC is made from. With None it is the shell operator, which few PCs support.
    `context` is the context of a Python PC. A method `destroy()`, if there is one, is called when the solver is
    destroyed, collectively.
    """

    matrix: PETSc.Mat | None

    @property
    def context(self) -> Any | None: ...

    def update(self, point: Point, shift: float) -> None:
        """Update the preconditioner for shift M - dg/du at `point`. Collective."""
        ...


class Preconditioner(Protocol):
    """The description of a preconditioner."""

    def build(self, setting: Setting) -> Built:
        """Build the preconditioner. Collective. Raises `ConfigurationError` if it does not fit the state."""
        ...


def resolve(preconditioner: Preconditioner | str | None) -> Preconditioner | None:
    """Return the preconditioner of a name. Raises `ConfigurationError` with the allowed names."""
    if not isinstance(preconditioner, str):
        return preconditioner
    if preconditioner not in NAMES:
        raise ConfigurationError(f"preconditioner = {preconditioner!r}: must be one of {', '.join(NAMES)}")
    named: dict[str, Preconditioner | None] = {
        "none": None,
        "block": BlockInverse(),
        "assembled": AssembledJacobian(),
    }
    return named[preconditioner]


@dataclass(frozen=True)
class BlockInverse:
    """The exact inverse for batches of small systems: the last axis is one system, all other axes count samples.

    The Jacobians of all samples take as many vector-Jacobian products as a system has components. They are factored in
    one batch. If samples depend on one another, the inverse is approximate.
    """

    def build(self, setting: Setting) -> Built:
        """See `Preconditioner.build`."""
        return BuiltBlocks(setting)


class BuiltBlocks:
    """Factored blocks shift M - dg/du, one for each sample. This is also the context of the Python PC."""

    matrix: PETSc.Mat | None = None

    def __init__(self, setting: Setting) -> None:
        shapes = setting.layout.shapes
        if any(not shape for shape in shapes):
            raise ConfigurationError("preconditioner = 'block': the state must have an axis")
        samples = {shape[:-1] for shape in shapes}
        if len(samples) > 1:
            raise ConfigurationError(
                f"preconditioner = 'block': parts of shapes {', '.join(map(str, shapes))}: all axes but the last count "
                "samples and must be the same"
            )
        self._layout, self._mass = setting.layout, setting.mass
        self._units = self._unit_vectors()
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def context(self) -> BuiltBlocks:
        """The context of the Python PC."""
        return self

    def update(self, point: Point, shift: float) -> None:
        """Factor the blocks at `point`."""
        blocks = -self._blocks(point.vjps(self._units))
        if self._mass is None:
            blocks.diagonal(dim1=-2, dim2=-1).add_(shift)
        else:
            rows = [self._mass.multiply(unit, transposed=True) for unit in self._units]
            blocks += shift * self._blocks(torch.stack(rows))
        # Factors of a singular block are not finite, which ends the linear solve on all ranks.
        self._factors = torch.linalg.lu_factor_ex(blocks)[:2]

    def _unit_vectors(self) -> torch.Tensor:
        """Return `[component, entry]`: for each component the sum of its unit vectors over all samples."""
        units = []
        for number, shape in enumerate(self._layout.shapes):
            for component in range(shape[-1]):
                unit = torch.zeros(self._layout.size, dtype=vectors.scalar_dtype())
                self._layout.parts(unit)[number][..., component] = 1.0
                units.append(unit)
        return torch.stack(units)

    def _blocks(self, products: torch.Tensor) -> torch.Tensor:
        """Return the blocks `[sample, row, column]` from the transposed products with the unit vectors."""
        return torch.stack([self._samples(product) for product in products], dim=-2)

    def _samples(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a flat state as `[sample, component]`, with the components of all parts next to each other."""
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in self._layout.parts(flat)], dim=-1)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-1 x."""
        self._solve(x, y, transposed=False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-T x."""
        self._solve(x, y, transposed=True)

    def _solve(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        assert self._factors is not None
        sides = self._samples(vectors.view(x, (self._layout.size,))).unsqueeze(-1)
        found = torch.linalg.lu_solve(*self._factors, sides, adjoint=transposed).squeeze(-1)
        pieces = torch.split(found, [shape[-1] for shape in self._layout.shapes], dim=-1)
        target = vectors.view(y, (self._layout.size,))
        for part, piece in zip(self._layout.parts(target), pieces, strict=True):
            part.copy_(piece.reshape(part.shape))
        y.stateIncrease()


@dataclass(frozen=True)
class AssembledJacobian:
    """The sparse Jacobian on a `GridPartition`, assembled by colouring, for any PC of PETSc's (`pc_type` and so on).

    `width` is the reach of f's stencil in each direction, in cells (along y and x, if they differ): 1 for a 3 x 3
    stencil, the sum of the layers' reaches for a convolutional network. A smaller width makes the Jacobian approximate.
    M must be diagonal.
    """

    width: int | tuple[int, int] = 1

    def build(self, setting: Setting) -> Built:
        """See `Preconditioner.build`."""
        partition, shapes = setting.partition, setting.layout.shapes
        if not isinstance(partition, GridPartition) or len(shapes) != 1:
            raise ConfigurationError(
                "preconditioner = 'assembled': needs a state that is one tensor on a GridPartition"
            )
        if setting.mass is not None and setting.mass.diagonal is None:
            raise ConfigurationError("preconditioner = 'assembled': needs a mass matrix that is diagonal")
        return BuiltJacobian(StencilJacobian(partition, self.width, shapes[0]), setting.mass)


class BuiltJacobian:
    """An assembled Jacobian."""

    context: Any | None = None

    def __init__(self, jacobian: StencilJacobian, mass: MassMatrix | None) -> None:
        self._jacobian, self._mass = jacobian, mass
        self.matrix: PETSc.Mat | None = jacobian.matrix

    def update(self, point: Point, shift: float) -> None:
        """Assemble the Jacobian at `point`. Collective."""
        self._jacobian.assemble(point.jvp, shift, None if self._mass is None else self._mass.diagonal)

    def destroy(self) -> None:
        """Destroy the Mat. Collective."""
        self._jacobian.matrix.destroy()


@dataclass(frozen=True, eq=False)
class Approximate:
    """A matrix of the user's that PETSc's PC is made from. Collective if `operator` is.

    `operator(t, u, shift)` returns an assembled `PETSc.Mat` near shift M - dg/du: always the same object with other
    values, or one of the same sparsity.
    """

    operator: Callable[[float, Any, float], PETSc.Mat]

    def build(self, setting: Setting) -> Built:
        """See `Preconditioner.build`."""
        return BuiltApproximation(self.operator, setting)


class BuiltApproximation:
    """A copy of the user's Mat."""

    context: Any | None = None

    def __init__(self, operator: Callable[[float, Any, float], PETSc.Mat], setting: Setting) -> None:
        self._operator, self._layout = operator, setting.layout
        layout = setting.layout
        zero = layout.inputs(layout.parts(torch.zeros(layout.size)))
        first = operator(0.0, layout.as_state(zero), 1.0)
        self.matrix: PETSc.Mat | None = first.duplicate(copy=True)

    def update(self, point: Point, shift: float) -> None:
        """Copy the user's Mat at `point`. Collective."""
        made = self._operator(point.time, self._layout.as_state(point.inputs), shift)
        assert self.matrix is not None
        made.copy(self.matrix, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)

    def destroy(self) -> None:
        """Destroy the copy, not the user's Mat. Collective."""
        if self.matrix is not None:
            self.matrix.destroy()


@dataclass(frozen=True, eq=False)
class UserPC:
    """A PC of the user's: the context of a Python PC, with `apply` and `applyTranspose`.

    A method `update(t, u, shift)`, if there is one, is called after a change of shift M - dg/du. u is this rank's part.
    """

    context: Any

    def build(self, setting: Setting) -> Built:
        """See `Preconditioner.build`."""
        return BuiltUserPC(self.context, setting.layout)


class BuiltUserPC:
    """A user's PC context."""

    matrix: PETSc.Mat | None = None

    def __init__(self, context: Any, layout: StateLayout) -> None:
        self.context: Any | None = context
        self._layout = layout

    def update(self, point: Point, shift: float) -> None:
        """Call the context's `update`. Collective if that is."""
        update = getattr(self.context, "update", None)
        if update is not None:
            update(point.time, self._layout.as_state(point.inputs), shift)


class BuiltMatrix:
    """The matrix shift M - A, for an implicit part that is a Mat A. Assembled again only for another shift."""

    context: Any | None = None

    def __init__(self, linear: PETSc.Mat, mass: MassMatrix | None) -> None:
        self._linear, self._mass = linear, mass
        self.matrix: PETSc.Mat | None = linear.duplicate(copy=True)

    def update(self, point: Point, shift: float) -> None:
        """Assemble the matrix for `shift`. Collective."""
        matrix = self.matrix
        assert matrix is not None
        self._linear.copy(matrix, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
        matrix.scale(-point.sign)
        if self._mass is None:
            matrix.shift(shift)
        else:
            self._mass.add_to(matrix, shift)

    def destroy(self) -> None:
        """Destroy the copy, not the user's Mat. Collective."""
        if self.matrix is not None:
            self.matrix.destroy()
