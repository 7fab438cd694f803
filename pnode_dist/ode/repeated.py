"""The preconditioner of a solve with tangents: that of the solve without tangents, repeated for each copy of the state.

The operator of a state and its tangent is [[S, 0], [-B, S]] with S = shift M - dg/du. The inverses of its equal
diagonal blocks precondition it. The remainder is nilpotent: if the inverses are exact, GMRES takes as many iterations
as there are copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from petsc4py import PETSc

from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.ode.rhs.mass import mass_of_one
from pnode_dist.ode.rhs.split import MatrixFunction
from pnode_dist.ode.rhs.tangent import without_tangents
from pnode_dist.ode.steppers.base import options_database
from pnode_dist.ode.steppers.preconditioner import Built, BuiltMatrix, Preconditioner, Setting
from pnode_dist.petsc import vectors

_OF_PC = re.compile(r"^-?((pc|sub|mg|fieldsplit|mat)_|.*_(pc|mat)_)")
_DIRECTLY_SOLVED, _PREFIX = 50_000, "of_copy_"


def split_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split PETSc options into those of the repeated PC and those of the solvers around it."""
    given = dict(options or {})
    inner = {name: value for name, value in given.items() if _OF_PC.match(name)}
    return inner, {name: value for name, value in given.items() if name not in inner} | {"pc_type": "python"}


@dataclass(frozen=True)
class Repeated:
    """A preconditioner that is repeated for each of `copies` of a state.

    `base` is the preconditioner of one copy, or its linear part as a Mat. `options` are PETSc options for its PC. The
    right-hand side takes one copy as a tuple if `is_tuple`.
    """

    base: Preconditioner | MatrixFunction
    copies: int
    is_tuple: bool
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, setting: Setting) -> Built:
        """See `Preconditioner.build`."""
        layout = setting.layout
        parts = len(layout.shapes) // self.copies
        one = replace(layout, shapes=layout.shapes[:parts], is_tuple=self.is_tuple)
        of_one = replace(setting, layout=one, mass=mass_of_one(setting.mass, one))
        if isinstance(self.base, MatrixFunction):
            return BuiltCopies(BuiltMatrix(self.base.matrix, of_one.mass), of_one, self, linear=True)
        return BuiltCopies(self.base.build(of_one), of_one, self)


class BuiltCopies:
    """A preconditioner that is applied to each copy. It is also the context of a Python PC."""

    matrix: PETSc.Mat | None = None

    def __init__(self, built: Built, setting: Setting, described: Repeated, linear: bool = False) -> None:
        self._built, self._layout, self._copies = built, setting.layout, described.copies
        size = setting.layout.size
        self._in = vectors.create_vec(setting.comm, size)
        self._out = vectors.create_vec(setting.comm, size)
        self._pc = PETSc.PC().create(comm=setting.comm)
        self._shells: list[PETSc.Mat] = []
        if built.context is not None:
            shell = PETSc.Mat().createPython(((size, None), (size, None)), _NoOperator(), comm=setting.comm)
            shell.setUp()
            self._shells.append(shell)
            self._pc.setOperators(shell if built.matrix is None else built.matrix)
            self._pc.setType(PETSc.PC.Type.PYTHON)
            self._pc.setPythonContext(built.context)
        else:
            self._pc.setOperators(built.matrix)
            if linear and self._in.getSize() <= _DIRECTLY_SOLVED:
                self._pc.setType("lu" if setting.comm.size == 1 else "redundant")
        given = {name: value for name, value in PETSc.Options().getAll().items() if _OF_PC.match(name)}
        given |= {name.removeprefix("-"): value for name, value in described.options}
        self._options = {_PREFIX + name: value for name, value in given.items()}
        self._pc.setOptionsPrefix(_PREFIX)
        self._is_set = built.context is not None

    @property
    def context(self) -> BuiltCopies:
        """The context of the Python PC."""
        return self

    def update(self, point: Point, shift: float) -> None:
        """Update the preconditioner for the state's copy at `point`. Collective."""
        layout = self._layout
        inputs = point.inputs[: len(layout.shapes)]
        func = without_tangents(point.func, self._copies.bit_length() - 1)
        self._built.update(Point(point.bound, func, layout, point.sign, point.time, inputs), shift)
        if not self._is_set:
            # The matrix has its values only after the first update.
            with options_database(self._options):
                self._pc.setFromOptions()
                self._pc.setUp()
            self._is_set = True
        elif self._built.matrix is not None:
            self._pc.setOperators(self._built.matrix)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-1 x."""
        self._each(self._pc.apply, x, y)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-T x."""
        self._each(self._pc.applyTranspose, x, y)

    def destroy(self, pc: PETSc.PC | None = None) -> None:
        """Destroy the PETSc objects of the preconditioner. Collective. PETSc passes the PC whose context this is."""
        destroy = getattr(self._built, "destroy", None)
        if destroy is not None:
            destroy()
        for made in (self._pc, self._in, self._out, *self._shells):
            made.destroy()

    def _each(self, apply: Any, x: PETSc.Vec, y: PETSc.Vec) -> None:
        size = self._layout.size
        source, target = (vectors.view(vec, (self._copies, size)) for vec in (x, y))
        for given, found in zip(source, target, strict=True):
            vectors.view(self._in, (size,)).copy_(given)
            self._in.stateIncrease()
            apply(self._in, self._out)
            found.copy_(vectors.view(self._out, (size,)))
        y.stateIncrease()


class _NoOperator:
    """The context of a Mat that is used for its sizes alone."""

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        raise AssertionError("the preconditioner of a copy uses its operator")
