"""Constant mass matrices: M du/dt = f(t, u), singular ones included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.petsc import vectors

Mass: TypeAlias = Any
"""A tensor, a `PETSc.Mat`, or for a tuple state a sequence of tensors."""


class MassMatrix(Protocol):
    """M on this rank's flat states, in PETSc's scalar type.

    `diagonal` is the diagonal of a diagonal M, else None. `algebraic` marks this rank's rows of zeros, whose equations
    have no time derivative.
    """

    diagonal: torch.Tensor | None
    algebraic: torch.Tensor

    def multiply(self, flat: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return M x or M^T x. Collective if M is a Mat."""
        ...

    def add_to(self, matrix: PETSc.Mat, scale: float) -> None:
        """Add scale M to a Mat. Collective on its communicator. `ConfigurationError` if M cannot be assembled."""
        ...

    def destroy(self) -> None:
        """Destroy the PETSc objects of the mass matrix, not the user's Mat. Collective on the Mat's communicator."""
        ...


def copy_of_tensors(mass: Mass | None) -> Mass | None:
    """Return `mass` with copies of its tensors. Mats are not copied."""
    if isinstance(mass, tuple | list):
        return type(mass)(map(copy_of_tensors, mass))
    return mass if mass is None or isinstance(mass, PETSc.Mat) else torch.as_tensor(mass).detach().clone()


def mass_matrix(mass: Mass | None, layout: StateLayout) -> MassMatrix | None:
    """Return the mass matrix of a state with this layout on this rank, None for the identity.

    `mass` is a tensor of the state's shape (the diagonal), a square tensor `[n, n]` that acts on the last axis of the
    state, or a `PETSc.Mat` with as many local rows as the state has entries; for a tuple state a sequence of tensors
    for its parts. Raises `ConfigurationError` for anything else.
    """
    if mass is None:
        return None
    if isinstance(mass, PETSc.Mat):
        if mass.getLocalSize() != (layout.size, layout.size):
            raise ConfigurationError(
                f"mass: a Mat with {mass.getLocalSize()} local rows and columns for {layout.size} entries on this rank"
            )
        return AssembledMass(mass)
    if isinstance(mass, tuple) and mass and all(isinstance(part, PETSc.Mat) for part in mass):
        # A state with tangents: one Mat for all parts of each copy.
        one = len(layout.shapes) // len(mass)
        of_one = mass_matrix(mass[0], replace(layout, shapes=layout.shapes[:one]))
        assert of_one is not None
        return RepeatedMass(of_one, len(mass))
    parts = tuple(mass) if layout.is_tuple and isinstance(mass, tuple | list) else (mass,)
    if len(parts) != len(layout.shapes):
        raise ConfigurationError(f"mass: {len(parts)} parts for a state of {len(layout.shapes)}")
    # Copies, because the caller may change the tensors before the backward pass.
    tensors = [torch.as_tensor(part).detach().to(vectors.scalar_dtype(), copy=True) for part in parts]
    for tensor, shape in zip(tensors, layout.shapes, strict=True):
        square = tensor.dim() == 2 and tensor.shape == (shape[-1:] * 2)
        if tuple(tensor.shape) != shape and not square:
            raise ConfigurationError(
                f"mass: shape {tuple(tensor.shape)}: must be that of the state, {shape}, or {tuple(shape[-1:] * 2)} "
                "to act on its last axis"
            )
    if all(tuple(tensor.shape) == shape for tensor, shape in zip(tensors, layout.shapes, strict=True)):
        return DiagonalMass(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    return BlockMass(tensors, layout)


class DiagonalMass:
    """A diagonal M; zeros are algebraic equations."""

    def __init__(self, diagonal: torch.Tensor) -> None:
        self.diagonal: torch.Tensor | None = diagonal
        self.algebraic = diagonal == 0
        self._values = diagonal

    def multiply(self, flat: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """M x."""
        return self._values * flat

    def add_to(self, matrix: PETSc.Mat, scale: float) -> None:
        """matrix += scale M."""
        vec = matrix.createVecLeft()
        vectors.view(vec, tuple(self._values.shape)).copy_(scale * self._values)
        vec.stateIncrease()
        matrix.setDiagonal(vec, addv=PETSc.InsertMode.ADD_VALUES)
        vec.destroy()

    def destroy(self) -> None:
        """Nothing to do."""


class BlockMass:
    """The same small matrix for every sample, on the last axis. Other parts of a tuple may have a diagonal."""

    diagonal: torch.Tensor | None = None

    def __init__(self, tensors: list[torch.Tensor], layout: StateLayout) -> None:
        self._layout = layout
        # For a state of n samples of size n, a tensor [n, n] is the diagonal.
        self._tensors = [
            (tensor, tuple(tensor.shape) == shape) for tensor, shape in zip(tensors, layout.shapes, strict=True)
        ]
        marks = []
        for (tensor, is_diagonal), shape in zip(self._tensors, layout.shapes, strict=True):
            zero = tensor == 0 if is_diagonal else (tensor == 0).all(dim=1)
            marks.append(zero.expand(shape).reshape(-1))
        self.algebraic = torch.cat(marks)

    def of_first(self, layout: StateLayout) -> BlockMass:
        """Return the mass matrix of the first parts, which have this layout."""
        return BlockMass([tensor for tensor, _ in self._tensors[: len(layout.shapes)]], layout)

    def multiply(self, flat: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """M x or M^T x."""
        products = []
        for part, (tensor, is_diagonal) in zip(self._layout.parts(flat), self._tensors, strict=True):
            product = tensor * part if is_diagonal else part @ (tensor if transposed else tensor.T)
            products.append(product)
        return torch.cat([product.reshape(-1) for product in products])

    def add_to(self, matrix: PETSc.Mat, scale: float) -> None:
        """Raise `ConfigurationError`: an assembled operator needs a mass matrix that is diagonal or assembled."""
        raise ConfigurationError(
            "mass: one that acts on the last axis cannot be put into an assembled operator: give it as a PETSc.Mat, or "
            "if it is diagonal as a tensor of the state's shape"
        )

    def destroy(self) -> None:
        """Nothing to do."""


class AssembledMass:
    """A `PETSc.Mat`."""

    diagonal: torch.Tensor | None = None

    def __init__(self, matrix: PETSc.Mat) -> None:
        self._matrix = matrix
        self._in, self._out = matrix.createVecs()
        first, last = matrix.getOwnershipRange()
        self.algebraic = torch.tensor([not any(matrix.getRow(row)[1]) for row in range(first, last)], dtype=torch.bool)

    def multiply(self, flat: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return M x or M^T x. Collective on the Mat's communicator."""
        source, target = (self._out, self._in) if transposed else (self._in, self._out)
        vectors.view(source, (flat.numel(),)).copy_(flat)
        source.stateIncrease()
        (self._matrix.multTranspose if transposed else self._matrix.mult)(source, target)
        return vectors.view(target, (flat.numel(),)).clone()

    def add_to(self, matrix: PETSc.Mat, scale: float) -> None:
        """matrix += scale M. Collective on the Mat's communicator."""
        matrix.axpy(scale, self._matrix, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)

    def destroy(self) -> None:
        """See `MassMatrix.destroy`."""
        self._in.destroy()
        self._out.destroy()


def mass_of_one(mass: MassMatrix | None, one: StateLayout) -> MassMatrix | None:
    """Return M of the first of several copies of a state, if it is the same for each. `one` is the copy's layout."""
    if isinstance(mass, RepeatedMass):
        return mass.one
    if isinstance(mass, DiagonalMass):
        assert mass.diagonal is not None
        return DiagonalMass(mass.diagonal[: one.size])
    return mass.of_first(one) if isinstance(mass, BlockMass) else mass


class RepeatedMass:
    """The same M for each of several copies of a state."""

    def __init__(self, one: MassMatrix, copies: int) -> None:
        self.one, self._copies = one, copies
        self.diagonal: torch.Tensor | None = None if one.diagonal is None else one.diagonal.repeat(copies)
        self.algebraic = one.algebraic.repeat(copies)

    def multiply(self, flat: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return M x or M^T x of each copy. Collective if that of one copy is."""
        return torch.cat([self.one.multiply(part, transposed) for part in flat.chunk(self._copies)])

    def add_to(self, matrix: PETSc.Mat, scale: float) -> None:
        """Raise `ConfigurationError`: several copies have no assembled operator."""
        raise ConfigurationError("mass: that of tangents cannot be put into an assembled operator")

    def destroy(self) -> None:
        """See `MassMatrix.destroy`."""
        self.one.destroy()
