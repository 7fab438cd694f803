"""The preconditioner of a steady state's linear systems, which takes the conditions beside f = 0 into account."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.ode.steppers.preconditioner import Preconditioner, Setting
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import vectors
from pnode_dist.steady.low_rank import Apply, LowRank


class Preconditioning:
    """A preconditioner P near shift I - df/du, which with conditions is changed by a matrix of low rank."""

    def __init__(
        self, comm: MPI.Comm, layout: StateLayout, partition: Partition | None, preconditioner: Preconditioner
    ) -> None:
        self._comm, self._size = comm, layout.size
        self._built = preconditioner.build(Setting(comm, layout, partition, None))
        self._changed: _Changed | None = None

    @property
    def matrix(self) -> PETSc.Mat | None:
        """The Mat that the PC of P is made from, None for the shell operator."""
        return self._built.matrix

    def install(self, pc: PETSc.PC, operator: PETSc.Mat, conditions: bool) -> None:
        """Make `pc`, whose options are set, this preconditioner. `operator` is the shell Mat. Collective.

        With `conditions` the options of PETSc's database apply to an inner PC, that of P.
        """
        if not conditions:
            self._set_context(pc)
            return
        inner = PETSc.PC().create(comm=self._comm)
        inner.setOperators(operator, self.matrix or operator)
        inner.setFromOptions()
        self._set_context(inner)
        self._changed = _Changed(self._comm, self._size, inner)
        pc.setType(PETSc.PC.Type.PYTHON)
        pc.setPythonContext(self._changed)

    def _set_context(self, pc: PETSc.PC) -> None:
        context: Any = self._built.context
        if context is not None:
            pc.setType(PETSc.PC.Type.PYTHON)
            pc.setPythonContext(context)

    def update(self, point: Point, shift: float, low_rank: LowRank | None) -> None:
        """Update P and its change for another Jacobian. Collective."""
        self._built.update(point, shift)
        if self._changed is not None:
            self._changed.low_rank, self._changed.inverses = low_rank, {}

    def destroy(self) -> None:
        """Destroy the PETSc objects. Collective."""
        if self._changed is not None:
            self._changed.destroy_objects()
        # A preconditioner of the user's may have no such method.
        destroy_built = getattr(self._built, "destroy", None)
        if destroy_built is not None:
            destroy_built()


class _Changed:
    """Context of a Python PC: the inverse of the inner PC's matrix, changed by `low_rank`.

    `inverses` holds the products with the inverse and its transpose. PETSc calls a method `destroy` of a context with
    each PC that has it, so there is none.
    """

    def __init__(self, comm: MPI.Comm, size: int, inner: PETSc.PC) -> None:
        self._size, self._inner = size, inner
        self._in, self._out = (vectors.create_vec(comm, size) for _ in range(2))
        self.low_rank: LowRank | None = None
        self.inverses: dict[bool, Apply] = {}

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-1 x."""
        self._apply(x, y, False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-T x."""
        self._apply(x, y, True)

    def _apply(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        assert self.low_rank is not None
        if transposed not in self.inverses:
            by_inner = partial(self._by_inner, transposed=transposed)
            self.inverses[transposed] = self.low_rank.inverse(by_inner, transposed)
        vectors.fill(y, self.inverses[transposed](vectors.view(x, (self._size,))))

    def _by_inner(self, flat: torch.Tensor, transposed: bool) -> torch.Tensor:
        vectors.fill(self._in, flat)
        (self._inner.applyTranspose if transposed else self._inner.apply)(self._in, self._out)
        return vectors.view(self._out, (self._size,)).clone()

    def destroy_objects(self) -> None:
        """Destroy the PETSc objects. Collective."""
        self._inner.destroy()
        self._in.destroy()
        self._out.destroy()
