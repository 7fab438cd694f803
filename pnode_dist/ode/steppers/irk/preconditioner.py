"""The preconditioner of the equations of all stages, made of one for shift M - df/du.

The Jacobian of the stages is scale W (x) M - diag(df/du). With the triangle T near W, scale T (x) M - 1 (x) df/du is
inverted by one application of the inverse of scale `shift` M - df/du for each stage. Without such a preconditioner
scale W (x) 1 is inverted, which turns the system into that of the usual form M - h A (x) df/du.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.ode.steppers.irk.equations import StackedStages
from pnode_dist.ode.steppers.preconditioner import Built
from pnode_dist.petsc import unwinding, vectors

_MOST_ITERATIONS = 20
"""The preconditioner of a stage is rebuilt within a step if a linear solve takes more iterations than this."""


class StagesPreconditioner:
    """The context of a Python PC for the equations `stages`, made of `built`, the preconditioner of one stage if any.

    `set_from_options` must be called within the options of the solver. Collective on `comm`.
    """

    def __init__(self, comm: MPI.Comm, stages: StackedStages, built: Built | None) -> None:
        self._stages, self._built = stages, built
        self._is_new = True
        self._scale = 1.0
        size = stages.layout.size
        self._in, self._out = vectors.create_vec(comm, size), vectors.create_vec(comm, size)
        self._pc = PETSc.PC().create(comm=comm)
        self._shell: PETSc.Mat | None = None
        if built is None:
            self._pc.setType(PETSc.PC.Type.NONE)
        elif built.context is not None:
            self._shell = PETSc.Mat().createPython(((size, None), (size, None)), _NoOperator(), comm=comm)
            self._shell.setUp()
            self._pc.setOperators(self._shell if built.matrix is None else built.matrix)
            self._pc.setType(PETSc.PC.Type.PYTHON)
            self._pc.setPythonContext(built.context)
        else:
            self._pc.setOperators(built.matrix)

    def set_from_options(self) -> None:
        """Read the options `pc_*` for the preconditioner of a stage. Collective.

        Raises `ConfigurationError` for a type that needs a preconditioner to be given.
        """
        self._pc.setFromOptions()
        if self._built is None and self._pc.getType() != PETSc.PC.Type.NONE:
            raise ConfigurationError(
                f"pc_type = {self._pc.getType()!r}: a method with coupled stages makes it from the keyword "
                "preconditioner, and there is none: must be 'none'"
            )

    def start_step(self) -> None:
        """Rebuild at the next new operator, so that a recomputed step has the same bits."""
        self._is_new = True

    def update(self, points: Sequence[Point], scale: float, ksp: PETSc.KSP) -> None:
        """Use this scale, and rebuild for the stages at `points` if needed. Collective."""
        self._scale = scale
        if self._built is None or not (self._is_new or ksp.getIterationNumber() > _MOST_ITERATIONS):
            return
        self._built.update(points[(len(points) - 1) // 2], self._stages.tableau.shift * scale)
        if self._built.matrix is not None:
            self._pc.setOperators(self._built.matrix)
        self._is_new = False

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-1 x."""
        self._solve(x, y, transposed=False)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = P^-T x."""
        self._solve(x, y, transposed=True)

    def destroy(self, pc: PETSc.PC | None = None) -> None:
        """Destroy the PETSc objects. Collective. PETSc passes the PC whose context this is."""
        for made in (self._pc, self._in, self._out, self._shell):
            if made is not None:
                made.destroy()

    def _solve(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        stages = self._stages
        try:
            given = stages.view(x)
            if self._built is None:
                matrix = torch.tensor(stages.tableau.matrix, dtype=given.dtype) / self._scale
                found = (matrix.T if transposed else matrix) @ given
            else:
                found = self._substituted(given, transposed)
            stages.view(y).copy_(found)
            y.stateIncrease()
        except BaseException as error:
            stages.error = unwinding.begin(error)
            raise

    def _substituted(self, given: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return P^-1 x or P^-T x by substitution in the triangle."""
        stages = self._stages
        rows = (stages.tableau.triangle.T if transposed else stages.tableau.triangle) * self._scale
        order = range(len(rows) - 1, -1, -1) if transposed else range(len(rows))
        found, done = torch.zeros_like(given), list[int]()
        for number in order:
            side = given[number]
            if done:
                known = rows[number, done] @ found[done]
                side = side - stages.multiplied(known.unsqueeze(0), transposed)[0]
            vectors.fill(self._in, side)
            (self._pc.applyTranspose if transposed else self._pc.apply)(self._in, self._out)
            found[number] = vectors.view(self._out, (len(side),))
            done.append(number)
        return found


class _NoOperator:
    """The context of a Mat that is used for its sizes alone."""

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        raise AssertionError("the preconditioner of a stage needs no operator")
