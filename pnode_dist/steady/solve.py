"""The solve for a steady state by PETSc's SNES or TS, and the transposed linear solve of its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode.given_options import check_read, check_read_by_all
from pnode_dist.ode.rhs.evaluation import StageGraph
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.steppers.base import END_OF_TIME, options_database
from pnode_dist.ode.steppers.implicit_ts import reason_name
from pnode_dist.ode.steppers.preconditioner import resolve
from pnode_dist.petsc import calls, vectors
from pnode_dist.petsc.objects import PetscObjects
from pnode_dist.steady.conditions import sums
from pnode_dist.steady.preconditioning import Preconditioning
from pnode_dist.steady.settings import SteadySettings
from pnode_dist.steady.system import Linearisation, SteadySystem

_ADVICE = "start from another u0, give a preconditioner, use solver = 'pseudo', or change PETSc's options"
_LEAST_LEFT, _REFINEMENTS = 1e-9, 4
_REST, _ROUNDING = 1e-4, 1e3 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class SteadyState:
    """A steady state `u` on this rank, and its solve.

    `reason` is PETSc's name of the test that ended the solve. `iterations` are Newton iterations, or steps of
    pseudo-time. `linear_iterations` are those of the linear solves, `evaluations` those of func, and `residual` is
    |f(u)| in the 2-norm over all ranks, without the components along the vectors of phase conditions.
    """

    u: State
    reason: str
    iterations: int
    linear_iterations: int
    evaluations: int
    residual: float


@dataclass(frozen=True)
class Outcome:
    """The end of a solve: the flat state, and the counts of `SteadyState`."""

    flat: torch.Tensor
    reason: str
    iterations: int
    linear_iterations: int
    residual: float


class _Linear:
    """The shell Mat of a system, and work Vecs. `options` are those of PETSc's solver."""

    def __init__(self, system: SteadySystem, options: dict[str, Any]) -> None:
        self.system, self.options = system, options
        size = system.layout.size
        self.vec, self.work = (vectors.create_vec(system.comm, size) for _ in range(2))
        self.operator = PETSc.Mat().createPython(((size, None), (size, None)), system, comm=system.comm)
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
def _objects(
    system: SteadySystem, settings: SteadySettings, options: dict[str, Any]
) -> Iterator[tuple[PetscObjects, _Linear]]:
    """The context of PETSc's objects. Destroys them at its end, and leaves them to a later solve after an error."""
    objects = PetscObjects(system.comm)
    try:
        preconditioner = resolve(settings.preconditioner)
        if preconditioner is not None:
            made = Preconditioning(system.comm, system.layout, settings.partition, preconditioner)
            objects.add(made)
            system.preconditioning = made
        linear = _Linear(system, options)
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
    if not any(name.removeprefix("-") == "ksp_type" for name in settings.options or ()) and not known.hasName(
        "ksp_type"
    ):
        # GMRES then tests the residual itself, not the preconditioned one.
        usual |= {"ksp_type": "gmres", "ksp_pc_side": "right"}
    if deflates:
        # Full steps, as in the literature: a line search ends in local minima that the factor of deflation makes.
        usual["snes_linesearch_type"] = "basic"
    if resolve(settings.preconditioner) is None:
        usual["pc_type"] = "none"
    usual = {name: value for name, value in usual.items() if not known.hasName(name)}
    return {**usual, **given, **(settings.options or {})}


def solve(system: SteadySystem, settings: SteadySettings, start: torch.Tensor) -> Outcome:
    """Solve the equations of `system` from the flat state `start`. Collective.

    Raises `ConvergenceError` on all ranks if that fails.
    """
    dtype = system.layout.compute_dtype
    target = 0.0
    if settings.is_pseudo or system.deflation is not None:
        # PETSc's own tests would compare with the residual after the first step, or times the factor of deflation.
        target = max(settings.atol, settings.relative_tolerance(dtype) * _norm(system, system.residual(start)))
    options = solver_options(settings, dtype, target, system.deflation is not None)
    with _objects(system, settings, options) as (objects, linear):
        vectors.fill(linear.vec, start)
        run = _pseudo if settings.is_pseudo else _newton
        outcome = run(objects, linear, settings, target)
    _check_rest(system, settings, start, outcome)
    return outcome


def _newton(objects: PetscObjects, linear: _Linear, settings: SteadySettings, target: float) -> Outcome:
    system, vec = linear.system, linear.vec
    snes = PETSc.SNES().create(comm=system.comm)
    objects.add(snes)
    snes.setType(settings.solver)
    snes.setFunction(system.function, linear.work)
    snes.setJacobian(system.jacobian, linear.operator, linear.matrix)
    unread = set(settings.options or ())
    _set_from_options(snes, linear.options, unread)
    if snes.getType() != settings.solver:
        raise ConfigurationError(f"snes_type = {snes.getType()!r}: must be {settings.solver!r}: use solver=")
    deflation = system.deflation
    if deflation is not None:

        def converged(snes: PETSc.SNES, number: int, norms: tuple[float, float, float]) -> Any:
            return _reason(snes, number, norms, deflation.factor(linear.current(snes)), target)

        snes.setConvergenceTest(converged)
    ksp = snes.getKSP()
    with options_database(linear.options):
        linear.install(ksp, deflation is not None)
    with system.errors(), options_database(linear.options, unread):
        snes.solve(None, vec)
    iterations = calls.total_linear_iterations(ksp)
    if iterations:
        check_read_by_all(unread, system.comm)
    reason, number = int(snes.getConvergedReason()), snes.getIterationNumber()
    words = reason_name(PETSc.SNES.ConvergedReason, reason)
    flat = vectors.view(vec, (system.layout.size,)).clone()
    residual = float(snes.getFunctionNorm()) / (1.0 if deflation is None else deflation.factor(flat))
    if reason < 0:
        if reason == PETSc.SNES.ConvergedReason.DIVERGED_LINEAR_SOLVE:
            words += f" (linear solve: {reason_name(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())})"
        raise _failure(settings.solver, words, f"{number} iterations", residual)
    return Outcome(flat, words, number, iterations, residual)


def _reason(
    snes: PETSc.SNES, number: int, norms: tuple[float, float, float], factor: float, target: float
) -> PETSc.SNES.ConvergedReason:
    """Return the result of PETSc's default tests for residuals times `factor`, with `target` for the relative one."""
    reasons = PETSc.SNES.ConvergedReason
    size, step, residual = norms
    if residual <= target * factor:
        return reasons.CONVERGED_FNORM_RELATIVE
    if number > 0 and step < snes.getTolerances()[2] * size:
        return reasons.CONVERGED_SNORM_RELATIVE
    return reasons.CONVERGED_ITERATING


def _pseudo(objects: PetscObjects, linear: _Linear, settings: SteadySettings, target: float) -> Outcome:
    system, vec = linear.system, linear.vec
    ts = PETSc.TS().create(comm=system.comm)
    objects.add(ts)
    ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
    ts.setType(PETSc.TS.Type.PSEUDO)
    ts.setIFunction(system.transient, linear.work)
    ts.setIJacobian(system.transient_jacobian, linear.operator, linear.matrix)
    if settings.step_size is not None:
        ts.setTimeStep(settings.step_size)
    ts.setMaxTime(END_OF_TIME)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
    ts.setErrorIfStepFails(False)
    unread = set(settings.options or ())
    _set_from_options(ts, linear.options, unread)
    if ts.getType() != PETSc.TS.Type.PSEUDO:
        raise ConfigurationError(f"ts_type = {ts.getType()!r}: must be 'pseudo': use solver=")
    snes = ts.getSNES()
    with options_database(linear.options):
        linear.install(snes.getKSP(), False)
    with system.errors(), options_database(linear.options, unread):
        ts.solve(vec)
    iterations = ts.getKSPIterations()
    if iterations:
        check_read_by_all(unread, system.comm)
    flat = vectors.view(vec, (system.layout.size,)).clone()
    residual = _norm(system, system.residual(flat))
    words = reason_name(PETSc.TS.ConvergedReason, int(ts.getConvergedReason()))
    # PETSc counts the end of the steps, and of the time, as success.
    if not residual <= target:
        raise _failure("pseudo", words, f"{ts.getStepNumber()} steps", residual)
    return Outcome(flat, words, ts.getStepNumber(), iterations, residual)


def transposed_solve(
    system: SteadySystem, settings: SteadySettings, graph: StageGraph, cotangent: torch.Tensor
) -> torch.Tensor:
    """Return w with (dR/du)^T w = `cotangent` at the state of `graph`. Collective.

    The tolerance of the residual, relative to `cotangent`, is `rtol`, or the option `ksp_rtol` if that is smaller.
    Raises `ConvergenceError` on all ranks if it is not reached.
    """
    options = solver_options(settings, system.layout.compute_dtype, 0.0)
    with _objects(system, settings, options) as (objects, linear):
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
    allowed = max(100 * rtol, _LEAST_LEFT) * _norm(system, cotangent)
    if not left <= allowed:
        raise ConvergenceError(
            f"the gradient of a steady state: the residual of the transposed linear system is {left:.3g}, above "
            f"{allowed:.3g}: choose another preconditioner, or give phase= if f has a symmetry"
        )
    return weights


def _refined(
    ksp: PETSc.KSP, linear: _Linear, linearisation: Linearisation, cotangent: torch.Tensor, rtol: float
) -> tuple[torch.Tensor, float]:
    """Return w with J^T w = `cotangent`, and the norm of its residual. Collective.

    A solve is repeated for the residual that rounding in the preconditioner leaves, as long as that is above `rtol`.
    """
    system = linear.system
    wanted = rtol * _norm(system, cotangent)
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
        before, norm = norm, _norm(system, rest)
        if not norm < before:
            return weights, before
        weights, left = better, rest
        if norm <= wanted:
            break
    return weights, norm


def _set_from_options(solver: PETSc.SNES | PETSc.TS, options: dict[str, Any], unread: set[str]) -> None:
    """Set up `solver` from PETSc's options, and check that all were read."""
    with options_database(options, unread):
        try:
            solver.setFromOptions()
        except PETSc.Error as error:
            reason = str(error).strip().splitlines()[-1].partition("] ")[2]
            raise ConfigurationError(f"petsc options: {reason}") from None
    check_read(unread, later=True)


def _check_rest(system: SteadySystem, settings: SteadySettings, start: torch.Tensor, outcome: Outcome) -> None:
    """Raise `ConvergenceError` if f is not 0 along the vectors of phase conditions. Collective.

    The equations do not contain these components. They are 0 at a steady state of a symmetric f.
    """
    phase = system.phase
    if phase is None:
        return
    value = system.value(outcome.flat)
    rest = float(phase.along(value).norm())
    # Rounding leaves a residual as large as that of the terms of f, of which J u is an estimate.
    terms = _norm(system, system.point(system.graph(outcome.flat)).jvp(outcome.flat))
    allowed = max(settings.atol, _REST * _norm(system, system.value(start)), _ROUNDING * terms)
    if not rest <= allowed:
        raise ConvergenceError(
            f"phase: the state that was found is not steady: |f| = {rest:.3g} along the vectors, above {allowed:.3g}: "
            "it moves along the symmetry, or the vectors do not span it"
        )


def _norm(system: SteadySystem, flat: torch.Tensor) -> float:
    """Return the 2-norm of a flat state over all ranks. Collective."""
    return math.sqrt(float(sums(system.comm, flat @ flat)))


def _failure(solver: str, reason: str, count: str, residual: float) -> ConvergenceError:
    return ConvergenceError(
        f"the steady state was not found: {solver} ended with {reason} after {count}, |f| = {residual:.3g}: {_ADVICE}"
    )
