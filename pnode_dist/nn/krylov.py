"""PETSc's KSP for a linear operator and its transpose, with a null space, and the tests of a solution."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode.given_options import check_read, check_read_by_all
from pnode_dist.ode.steppers.base import options_database
from pnode_dist.ode.steppers.implicit_ts import reason_name
from pnode_dist.petsc import unwinding, vectors
from pnode_dist.petsc.objects import PetscObjects, destroy_left
from pnode_dist.steady.conditions import sums

RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The default of ksp_rtol, by the type in which products are computed."""

# CG and GMRES then test the residual itself, not the preconditioned one.
_TRUE_RESIDUAL = {"cg": {"ksp_norm_type": "unpreconditioned"}, "gmres": {"ksp_pc_side": "right"}}
_ABOVE_RTOL = 100.0
_numbers = count()


class LinearOperator(Protocol):
    """A linear operator A on flat vectors of PETSc's scalar type, of which each rank has its part. Collective.

    `dtype` is the type in which products are computed.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def times(self, flat: torch.Tensor) -> torch.Tensor:
        """Return A u."""
        ...

    def transposed_times(self, flat: torch.Tensor) -> torch.Tensor:
        """Return A^T u."""
        ...


class NullSpace:
    """The span of the orthonormal rows of `basis` `[vector, entry]`, of which each rank has its entries."""

    def __init__(self, comm: MPI.Comm, basis: torch.Tensor) -> None:
        self.comm = comm
        self.basis = basis

    def removed(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a flat vector without its part in the space. Collective."""
        return flat - sums(self.comm, self.basis @ flat) @ self.basis


def null_space(comm: MPI.Comm, given: torch.Tensor) -> NullSpace:
    """Return the span of the rows of `given`. Collective.

    Raises `ConfigurationError` on all ranks if a row is not finite, zero, or a combination of those before it.
    """
    basis = torch.empty(0, given.shape[1], dtype=given.dtype)
    for number, row in enumerate(given):
        length = _norm(comm, row)
        rest = row / length
        # Twice, because rounding spoils a single pass for nearly dependent vectors.
        for _ in range(2):
            rest = NullSpace(comm, basis).removed(rest)
        left = _norm(comm, rest)
        if not (length < math.inf and left > 1e-10):
            raise ConfigurationError(
                f"KSPSolve: nullspace[{number}]: must be finite, not zero, and no combination of the vectors before it"
            )
        basis = torch.cat([basis, rest[None] / left])
    return NullSpace(comm, basis)


class KrylovSolver:
    """A KSP for operators of one size. Creating it is collective on `comm`.

    `size` is the number of entries on this rank. `matrix` is the Mat that the preconditioner is made from, None for
    none. With `symmetric` the method may rely on A^T = A. `iterations` counts those of all solves.
    Raises `ConfigurationError` for options that PETSc refuses, or does not read.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        size: int,
        matrix: PETSc.Mat | None,
        symmetric: bool,
        space: NullSpace | None,
        options: Mapping[str, Any],
    ) -> None:
        self.comm = comm
        self.symmetric = symmetric
        self.space = space
        self.iterations = 0
        given = {str(name).removeprefix("-"): value for name, value in options.items()}
        # A prefix of its own: the options of a surrounding solve are not for this one.
        self._prefix = f"pnode_dist_solve_{next(_numbers)}_"
        usual: dict[str, Any] = {"ksp_type": "cg" if symmetric else "gmres"}
        if matrix is None:
            usual["pc_type"] = "none"
        elif symmetric:
            usual["pc_type"] = "gamg"
        usual |= _TRUE_RESIDUAL.get(str(given.get("ksp_type", usual["ksp_type"])), {})
        if matrix is None and str(given.get("pc_type", "none")) not in ("none", "shell", "mat"):
            raise ConfigurationError(
                f"KSPSolve: options: pc_type = {given['pc_type']!r}: needs the entries of A: give preconditioner=, a "
                "PETSc.Mat near A, or leave pc_type away"
            )
        self._options = {self._prefix + name: value for name, value in {**usual, **given}.items()}
        self._unread = {self._prefix + name for name in given}
        self._has_rtol = "ksp_rtol" in given
        destroy_left(comm)
        objects = PetscObjects(comm)
        # No reference to this object, so that it can be freed. At the end PETSc may have ended before.
        weakref.finalize(self, objects.leave).atexit = False
        self._shell = _Shell()
        self._operator = PETSc.Mat().createPython(((size, None), (size, None)), self._shell, comm=comm)
        objects.add(self._operator)
        self._operator.setUp()
        if space is not None:
            vecs = [self._operator.createVecRight() for _ in space.basis]
            for vec, row in zip(vecs, space.basis, strict=True):
                vectors.fill(vec, row)
            attached = PETSc.NullSpace().create(constant=False, vectors=vecs, comm=comm)
            self._operator.setNullSpace(attached)
            self._operator.setTransposeNullSpace(attached)
            for thing in (*vecs, attached):
                objects.add(thing)
        self._right, self._solution = self._operator.createVecs()
        self._ksp = PETSc.KSP().create(comm=comm)
        for thing in (self._right, self._solution, self._ksp):
            objects.add(thing)
        self._ksp.setOptionsPrefix(self._prefix)
        self._ksp.setOperators(self._operator, self._operator if matrix is None else matrix)
        with options_database(self._options, self._unread):
            try:
                self._ksp.setFromOptions()
            except PETSc.Error as error:
                reason = str(error).strip().splitlines()[-1].partition("] ")[2]
                raise ConfigurationError(f"KSPSolve: options: {reason}") from None
        check_read(self._bare_unread(), later=True)

    def _bare_unread(self) -> set[str]:
        return {name.removeprefix(self._prefix) for name in self._unread}

    def solve(self, operator: LinearOperator, right: torch.Tensor, transposed: bool) -> torch.Tensor:
        """Return x with A x = `right`, or A^T x = `right` if `transposed`, both flat. Collective.

        With a null space PETSc removes it from the right-hand side and the solution.
        Raises `ConvergenceError` on all ranks if PETSc does not reach `ksp_rtol`, or if the residual at the end is
        above 100 times that tolerance and above the rounding that the type of the operator allows for.
        """
        if not self._has_rtol:
            self._ksp.setTolerances(rtol=RTOL[operator.dtype])
        vectors.fill(self._right, right)
        # PETSc sets a preconditioner up again if its Mat has changed, and reads options then.
        with options_database(self._options, self._unread), self._shell.of(operator):
            if transposed and not self.symmetric:
                self._ksp.solveTranspose(self._right, self._solution)
            else:
                self._ksp.solve(self._right, self._solution)
        name, reason = ("transposed linear system" if transposed else "linear system"), self._ksp.getConvergedReason()
        number = self._ksp.getIterationNumber()
        self.iterations += number
        if number:
            unread = self._bare_unread()
            check_read_by_all(unread, self.comm)
            self._unread.clear()
        tolerances = self._ksp.getTolerances()
        if int(reason) < 0:
            raise ConvergenceError(
                f"KSPSolve: the {name} was not solved to ksp_rtol = {tolerances[0]:g}: "
                f"{reason_name(PETSc.KSP.ConvergedReason, int(reason))} after {number} iterations: choose another "
                "ksp_type, ksp_max_it or preconditioner, or give nullspace= if A is singular"
            )
        solution = vectors.view(self._solution, (right.numel(),)).clone()
        self._check(name, right, (operator.transposed_times if transposed else operator.times)(solution), operator)
        return solution

    def _check(self, name: str, right: torch.Tensor, image: torch.Tensor, operator: LinearOperator) -> None:
        """Raise `ConvergenceError` on all ranks unless the residual of the solution is small. Collective."""
        rtol, atol, *_ = self._ksp.getTolerances()
        rest = right - image
        if self.space is not None:
            right, rest = self.space.removed(right), self.space.removed(rest)
        left, size = _norm(self.comm, rest), _norm(self.comm, right)
        # Rounding may not allow for a smaller residual.
        allowed = max(_ABOVE_RTOL * rtol, 0.1 * math.sqrt(torch.finfo(operator.dtype).eps)) * size
        if not left <= max(allowed, _ABOVE_RTOL * atol):
            words = "A is not symmetric, or its" if self.symmetric else "the"
            raise ConvergenceError(
                f"KSPSolve: the residual of the {name} is {left:.3g} at the end, above {allowed:.3g}: {words} "
                "preconditioner is too far from A: choose another one, or a ksp_type that tests the true residual"
            )

    def verify(self, operator: LinearOperator) -> None:
        """Check that an operator is linear, symmetric if stated, and zero on the null space. Collective.

        Raises `ConfigurationError` on all ranks if not.
        """
        size = self._right.getLocalSize()
        random = torch.Generator().manual_seed(self.comm.rank)
        r, s = torch.randn(2, size, generator=random, dtype=vectors.scalar_dtype())
        ar, as_, both = operator.times(r), operator.times(s), operator.times(2 * r + s)
        small = math.sqrt(torch.finfo(operator.dtype).eps)
        image, length = _norm(self.comm, both), _norm(self.comm, 2 * r + s)
        if not math.isfinite(image):
            raise ConfigurationError("KSPSolve: operator: A u is not finite for a finite u")
        if not _norm(self.comm, both - 2 * ar - as_) <= small * image:
            raise ConfigurationError(
                "KSPSolve: operator: A(2 u + v) is not 2 A(u) + A(v): must be linear in u, without a constant term; "
                "pnode_dist.steady_state solves nonlinear equations"
            )
        if self.symmetric:
            mixed = float(sums(self.comm, ((s * ar).sum() - (r * as_).sum())[None]))
            if not abs(mixed) <= small * image * length:
                raise ConfigurationError("KSPSolve: symmetric = True: but <v, A u> is not <A v, u>: leave it away")
        for number, row in enumerate(() if self.space is None else self.space.basis):
            for name, product in (("A", operator.times), ("A^T", operator.transposed_times)):
                if not _norm(self.comm, product(row)) <= small * image / length:
                    raise ConfigurationError(f"KSPSolve: nullspace[{number}]: {name} times this vector must be 0")


class _Shell:
    """The context of a Python Mat: the operator of the present solve, and the error that it has raised."""

    def __init__(self) -> None:
        self._operator: LinearOperator | None = None
        self._error: BaseException | None = None

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """MatMult: y = A x."""
        self._multiply(x, y, False)

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """MatMultTranspose: y = A^T x."""
        self._multiply(x, y, True)

    def _multiply(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        assert self._operator is not None
        try:
            given = vectors.view(x, (x.getLocalSize(),))
            vectors.fill(y, self._operator.transposed_times(given) if transposed else self._operator.times(given))
        except BaseException as error:
            self._error = unwinding.begin(error)
            raise

    @contextmanager
    def of(self, operator: LinearOperator) -> Iterator[None]:
        """The context of a solve with `operator`. Raises its exception instead of PETSc's error code."""
        before, self._operator = self._operator, operator
        try:
            yield
        except BaseException:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            unwinding.end()
            self._operator, self._error = before, None


def _norm(comm: MPI.Comm, flat: torch.Tensor) -> float:
    return math.sqrt(float(sums(comm, flat.square().sum()[None])))
