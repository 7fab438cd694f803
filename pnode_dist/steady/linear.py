"""The linear systems of a steady state: PETSc's objects and options, and the transposed solve of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConvergenceError
from pnode_dist.ode.rhs.evaluation import StageGraph
from pnode_dist.ode.steppers.base import options_database
from pnode_dist.ode.steppers.implicit_ts import reason_name
from pnode_dist.ode.steppers.preconditioner import resolve
from pnode_dist.petsc import vectors
from pnode_dist.petsc.objects import PetscObjects
from pnode_dist.steady.preconditioning import Preconditioning
from pnode_dist.steady.settings import SteadySettings
from pnode_dist.steady.system import Linearisation, SteadySystem

_LEAST_LEFT, _REFINEMENTS = 1e-9, 4


class _Operator:
    """Context of the shell Mat of a system's last Jacobian."""

    def __init__(self, system: SteadySystem) -> None:
        self._system = system

    def mult(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._apply(x, y, False)

    def multTranspose(self, mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        self._apply(x, y, True)

    def _apply(self, x: PETSc.Vec, y: PETSc.Vec, transposed: bool) -> None:
        system = self._system
        with system.stored():
            found = system.linearisation
            assert found is not None
            flat = vectors.view(x, (system.layout.size,))
            vectors.fill(y, found.transposed_times(flat) if transposed else found.times(flat))


class Linear:
    """The shell Mat of a system, and work Vecs. `options` are those of PETSc's solver."""

    def __init__(self, system: SteadySystem, options: dict[str, Any]) -> None:
        self.system, self.options = system, options
        size = system.layout.size
        self.vec, self.work = (vectors.create_vec(system.comm, size) for _ in range(2))
        sizes = ((size, None), (size, None))
        self.operator = PETSc.Mat().createPython(sizes, _Operator(system), comm=system.comm)
        self.operator.setUp()

    def current(self, snes: PETSc.SNES) -> torch.Tensor:
        """Return the current iterate of `snes`, flat."""
        return vectors.view(snes.getSolution(), (self.system.layout.size,))

    @property
    def matrix(self) -> PETSc.Mat:
        """The Mat that the PC is made from."""
        preconditioning = self.system.preconditioning
        matrix = None if preconditioning is None else preconditioning.matrix
        return self.operator if matrix is None else matrix

    def install(self, ksp: PETSc.KSP, deflates: bool) -> None:
        """Make the PC of `ksp`, whose options are set, the preconditioner. Collective."""
        system = self.system
        if system.preconditioning is not None:
            conditions = system.phase is not None or deflates
            system.preconditioning.install(ksp.getPC(), self.operator, conditions)

    def destroy(self) -> None:
        """Destroy the PETSc objects. Collective."""
        self.operator.destroy()
        self.vec.destroy()
        self.work.destroy()


@contextmanager
def objects_of(
    system: SteadySystem, settings: SteadySettings, options: dict[str, Any]
) -> Iterator[tuple[PetscObjects, Linear]]:
    """The context of PETSc's objects. Destroys them at its end, and leaves them to a later solve after an error."""
    objects = PetscObjects(system.comm)
    try:
        preconditioner = resolve(settings.preconditioner)
        if preconditioner is not None:
            made = Preconditioning(system.comm, system.layout, settings.partition, preconditioner)
            objects.add(made)
            system.preconditioning = made
        linear = Linear(system, options)
        objects.add(linear)
        yield objects, linear
    except BaseException:
        # Another rank may not have failed, and to destroy is collective.
        objects.leave()
        raise
    finally:
        system.preconditioning = system.linearisation = None
    objects.destroy()


def solver_options(
    settings: SteadySettings, dtype: torch.dtype, target: float, deflates: bool = False
) -> dict[str, Any]:
    """Return the options of a solve: the user's, those of `settings`, and defaults that PETSc's command line lacks."""
    usual, given = settings.petsc_options(dtype, target)
    known = PETSc.Options()
    chosen = {str(name).removeprefix("-") for name in settings.options or ()}
    if "ksp_type" not in chosen and not known.hasName("ksp_type"):
        # GMRES then tests the residual itself, not the preconditioned one.
        usual |= {"ksp_type": "gmres", "ksp_pc_side": "right"}
    if deflates:
        # Full steps, as in the literature: a line search ends in local minima that the factor of deflation makes.
        usual["snes_linesearch_type"] = "basic"
    if resolve(settings.preconditioner) is None:
        usual["pc_type"] = "none"
    usual = {name: value for name, value in usual.items() if not known.hasName(name)}
    return {**usual, **given, **(settings.options or {})}


def transposed_solve(
    system: SteadySystem, settings: SteadySettings, graph: StageGraph, cotangent: torch.Tensor
) -> torch.Tensor:
    """Return w with (dR/du)^T w = `cotangent` at the state of `graph`. Collective.

    The tolerance of the residual, relative to `cotangent`, is `rtol`, or the option `ksp_rtol` if that is smaller.
    Raises `ConvergenceError` on all ranks if PETSc does not reach it, or if the residual at the end is above 100 times
    that tolerance and above 1e-9.
    """
    options = solver_options(settings, system.layout.compute_dtype, 0.0)
    with objects_of(system, settings, options) as (objects, linear):
        ksp = PETSc.KSP().create(comm=system.comm)
        objects.add(ksp)
        ksp.setOperators(linear.operator, linear.matrix)
        with options_database(options):
            ksp.setFromOptions()
            linear.install(ksp, False)
        rtol = min(ksp.getTolerances()[0], settings.relative_tolerance(system.layout.compute_dtype))
        ksp.setTolerances(rtol=rtol)
        linearisation = Linearisation(system.point(graph), system.comm, system.phase)
        with system.errors(), options_database(options):
            system.use(linearisation)
            weights, left = _refined(ksp, linear, linearisation, cotangent, rtol)
    # Rounding may not allow for a smaller residual.
    allowed = max(100 * rtol, _LEAST_LEFT) * system.norm(cotangent)
    if not left <= allowed:
        raise ConvergenceError(
            f"the gradient of a steady state: the residual of the transposed linear system is {left:.3g}, above "
            f"{allowed:.3g}: choose another preconditioner, or give phase= if f has a symmetry"
        )
    return weights


def _refined(
    ksp: PETSc.KSP, linear: Linear, linearisation: Linearisation, cotangent: torch.Tensor, rtol: float
) -> tuple[torch.Tensor, float]:
    """Return w with J^T w = `cotangent`, and the norm of its residual. Collective.

    A solve is repeated for the residual that rounding in the preconditioner leaves, as long as that is above `rtol`.
    """
    system = linear.system
    wanted = rtol * system.norm(cotangent)
    weights, left, norm = torch.zeros_like(cotangent), cotangent, math.inf
    for _ in range(_REFINEMENTS):
        vectors.fill(linear.work, left)
        ksp.solveTranspose(linear.work, linear.vec)
        reason = int(ksp.getConvergedReason())
        system.bound.adjoint_linear_iterations += ksp.getIterationNumber()
        if reason < 0 and norm == math.inf:
            raise ConvergenceError(
                f"the gradient of a steady state: the transposed linear system was not solved to rtol = {rtol:g}: "
                f"{reason_name(PETSc.KSP.ConvergedReason, reason)} after {ksp.getIterationNumber()} iterations: choose "
                "another preconditioner, ksp_max_it or ksp_type, or give phase= if f has a symmetry"
            )
        better = weights + vectors.view(linear.vec, (system.layout.size,))
        rest = cotangent - linearisation.transposed_times(better)
        before, norm = norm, system.norm(rest)
        if not norm < before:
            return weights, before
        weights, left = better, rest
        if norm <= wanted:
            break
    return weights, norm
