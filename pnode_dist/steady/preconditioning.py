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
    """A preconditioner P near shift I - df/du, and with conditions that of P changed by a matrix of low rank.

    With conditions this is the context of a Python PC, around the PC of P.
    """

    def __init__(
        self, comm: MPI.Comm, layout: StateLayout, partition: Partition | None, preconditioner: Preconditioner
    ) -> None:
        self._size = layout.size
        self._built = preconditioner.build(Setting(comm, layout, partition, None))
        self._inner: PETSc.PC | None = None
        self._in, self._out = (vectors.create_vec(comm, layout.size) for _ in range(2))
        self._low_rank: LowRank | None = None
        self._inverses: dict[bool, Apply] = {}

    @property
    def matrix(self) -> PETSc.Mat | None:
        """The Mat that the PC of P is made from, None for the shell operator."""
        return self._built.matrix

    def install(self, pc: PETSc.PC, operator: PETSc.Mat, conditions: bool) -> None:
        """Make `pc`, whose options are set, this preconditioner. `operator` is the shell Mat. Collective.

        The options of PETSc's database apply to the PC of P.
        """
        if not conditions:
            self._install_context(pc)
            return
        inner = PETSc.PC().create(comm=pc.comm)
        inner.setOperators(operator, self.matrix or operator)
        inner.setFromOptions()
        self._install_context(inner)
        self._inner = inner
        pc.setType(PETSc.PC.Type.PYTHON)
        pc.setPythonContext(self)

    def _install_context(self, pc: PETSc.PC) -> None:
        context: Any = self._built.context
        if context is not None:
            pc.setType(PETSc.PC.Type.PYTHON)
            pc.setPythonContext(context)

    def update(self, point: Point, shift: float, low_rank: LowRank | None) -> None:
        """Update P for another Jacobian. Collective."""
        self._built.update(point, shift)
        self._low_rank, self._inverses = low_rank, {}

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-1 x, with the change of low rank."""
        self._apply(x, y, False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-T x, with the change of low rank."""
        self._apply(x, y, True)

    def _apply(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        assert self._low_rank is not None
        if transposed not in self._inverses:
            by_inner = partial(self._by_inner, transposed=transposed)
            self._inverses[transposed] = self._low_rank.inverse(by_inner, transposed)
        vectors.fill(y, self._inverses[transposed](vectors.view(x, (self._size,))))

    def _by_inner(self, flat: torch.Tensor, transposed: bool) -> torch.Tensor:
        assert self._inner is not None
        vectors.fill(self._in, flat)
        (self._inner.applyTranspose if transposed else self._inner.apply)(self._in, self._out)
        return vectors.view(self._out, (self._size,)).clone()

    def destroy(self) -> None:
        """Destroy the PETSc objects. Collective."""
        if self._inner is not None:
            self._inner.destroy()
        # A preconditioner of the user's may have no such method.
        destroy_built = getattr(self._built, "destroy", None)
        if destroy_built is not None:
            destroy_built()
        self._in.destroy()
        self._out.destroy()
