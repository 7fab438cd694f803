"""The solve for a steady state by PETSc's SNES or TS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError, ConvergenceError
from pnode_dist.ode.given_options import check_read, check_read_by_all
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.steppers.base import END_OF_TIME, options_database
from pnode_dist.ode.steppers.implicit_ts import reason_name
from pnode_dist.petsc import calls, vectors
from pnode_dist.petsc.objects import PetscObjects
from pnode_dist.steady.linear import Linear, objects_of, solver_options
from pnode_dist.steady.settings import SteadySettings
from pnode_dist.steady.system import Linearisation, SteadySystem

_ADVICE = "start from another u0, give a preconditioner, use solver = 'pseudo', or change PETSc's options"
_ABOVE_RTOL, _ROUNDINGS = 1e3, 1e3


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


def solve(system: SteadySystem, settings: SteadySettings, start: torch.Tensor) -> Outcome:
    """Solve the equations of `system` from the flat state `start`. Collective.

    Raises `ConvergenceError` on all ranks if that fails.
    """
    dtype = system.layout.compute_dtype
    target = 0.0
    if settings.is_pseudo or system.deflation is not None:
        # PETSc's own tests would compare with the residual after the first step, or times the factor of deflation.
        target = max(settings.atol, settings.relative_tolerance(dtype) * system.norm(system.residual(start)))
    options = solver_options(settings, dtype, target, system.deflation is not None)
    with objects_of(system, settings, options) as (objects, linear):
        vectors.fill(linear.vec, start)
        run = _pseudo if settings.is_pseudo else _newton
        outcome = run(objects, linear, settings, target)
    _check_rest(system, settings, start, outcome)
    return outcome


def _newton(objects: PetscObjects, linear: Linear, settings: SteadySettings, target: float) -> Outcome:
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


def _pseudo(objects: PetscObjects, linear: Linear, settings: SteadySettings, target: float) -> Outcome:
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
    residual = system.norm(system.residual(flat))
    words = reason_name(PETSc.TS.ConvergedReason, int(ts.getConvergedReason()))
    # PETSc counts the end of the steps, and of the time, as success.
    if not residual <= target:
        raise _failure("pseudo", words, f"{ts.getStepNumber()} steps", residual)
    return Outcome(flat, words, ts.getStepNumber(), iterations, residual)


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
    rest = float(phase.along(system.value(outcome.flat)).norm())
    dtype = system.layout.compute_dtype
    # Rounding leaves a residual in proportion to the size of the terms of f.
    at_end = Linearisation(system.point(system.graph(outcome.flat)), system.comm, phase)
    terms = at_end.size() * system.norm(outcome.flat)
    of_start = settings.relative_tolerance(dtype) * system.norm(system.value(start))
    allowed = max(settings.atol, _ABOVE_RTOL * of_start, _ROUNDINGS * torch.finfo(dtype).eps * terms)
    if not rest <= allowed:
        raise ConvergenceError(
            f"phase: the state that was found is not steady: |f| = {rest:.3g} along the vectors, above {allowed:.3g}: "
            "it moves along the symmetry, or the vectors do not span it"
        )


def _failure(solver: str, reason: str, count: str, residual: float) -> ConvergenceError:
    return ConvergenceError(
        f"the steady state was not found: {solver} ended with {reason} after {count}, |f| = {residual:.3g}: {_ADVICE}"
    )
