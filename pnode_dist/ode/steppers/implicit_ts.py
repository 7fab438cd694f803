"""The PETSc TS of an implicit method: its type, its callbacks, and the options that apply unless others are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method, by_table, has_adjoint
from pnode_dist.ode.rhs.linearisation import Part
from pnode_dist.ode.steppers.base import END_OF_TIME, MOST_STEPS, PetscOptions
from pnode_dist.ode.steppers.own_tables import register_own_tables
from pnode_dist.ode.steppers.petsc_callbacks import (
    ExplicitOperator,
    ImplicitFunction,
    ParameterOperator,
    ShiftedOperator,
)
from pnode_dist.ode.steppers.preconditioner import Built, BuiltMatrix

_TYPES = {
    "arkimex": PETSc.TS.Type.ARKIMEX,
    "dirk": PETSc.TS.Type.DIRK,
    "rosw": PETSc.TS.Type.ROSW,
    "bdf": PETSc.TS.Type.BDF,
}
_DIRECTLY_SOLVED = 50_000
"""A linear implicit part of at most so many unknowns is factored by default; a larger one is solved iteratively."""


@dataclass(frozen=True)
class TsParts:
    """The objects that a TS of an implicit method is made of. Its operators are shell Mats.

    `adjoint` and `parameter_gradient` are the Vecs that PETSc's adjoint writes to. The second is used only if the
    right-hand side `has_parameters`.
    """

    comm: MPI.Comm
    method: Method
    function: ImplicitFunction
    state: PETSc.Vec
    adjoint: PETSc.Vec
    parameter_gradient: PETSc.Vec
    has_parameters: bool
    built: Built | None

    def create_ts(self) -> PETSc.TS:
        """Create a TS for the method, with its callbacks and state. Its options are not set yet. Collective."""
        method, function, built = self.method, self.function, self.built
        ts = PETSc.TS().create(comm=self.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        set_type(ts, method)
        if function.mass is None and has_adjoint(method):
            # With any other equation type PETSc's adjoints of ARKIMEX are silently wrong.
            ts.setEquationType(PETSc.TS.EquationType.ODE_EXPLICIT)
        operator = self._state_operator(ShiftedOperator(function))
        matrix = operator if built is None or built.matrix is None else built.matrix
        ts.setIFunction(function.residual, self.state.duplicate())
        ts.setIJacobian(function.jacobian, operator, matrix)
        if method.family == "arkimex":
            explicit = self._state_operator(ExplicitOperator(function))
            ts.setRHSFunction(function.explicit, self.state.duplicate())
            ts.setRHSJacobian(function.explicit_jacobian, explicit, explicit)
        if has_adjoint(method):
            self._set_adjoint(ts)
        ts.setSolution(self.state)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        if built is not None and built.context is not None:
            pc = ts.getSNES().getKSP().getPC()
            pc.setType(PETSc.PC.Type.PYTHON)
            pc.setPythonContext(built.context)
        return ts

    def _set_adjoint(self, ts: PETSc.TS) -> None:
        function = self.function
        if not self.has_parameters:
            ts.setCostGradients([self.adjoint])
            return
        ts.setIJacobianP(function.parameter_jacobian, self._parameter_operator(Part.IMPLICIT))
        if self.method.family == "arkimex":
            ts.setRHSJacobianP(function.explicit_parameter_jacobian, self._parameter_operator(Part.EXPLICIT))
        ts.setCostGradients([self.adjoint], [self.parameter_gradient])

    def _state_operator(self, context: Any) -> PETSc.Mat:
        local = self.function.layout.size
        return self._shell(((local, None), (local, None)), context)

    def _parameter_operator(self, part: Part) -> PETSc.Mat:
        columns = self.parameter_gradient.getLocalSize()
        return self._shell(((self.function.layout.size, None), (columns, None)), ParameterOperator(self.function, part))

    def _shell(self, sizes: Sequence[tuple[int, None]], context: Any) -> PETSc.Mat:
        mat = PETSc.Mat().createPython(sizes, context, comm=self.comm)
        mat.setUp()
        return mat


def set_type(ts: PETSc.TS, method: Method) -> None:
    """Set the type of `ts`, and its table if the type has several."""
    if method.family == "theta":
        ts.setType(method.petsc_name)
        return
    ts.setType(_TYPES[method.family])
    register_own_tables()
    if method.family in ("arkimex", "dirk"):
        (ts.setARKIMEXType if method.family == "arkimex" else ts.setDIRKType)(method.petsc_name)


def default_options(parts: TsParts, options: PetscOptions, dtype: torch.dtype, linear: bool) -> dict[str, Any]:
    """Return the options that apply where neither the caller nor the command line gives others.

    `dtype` is the floating type that f computes in. `linear`: the implicit part is a Mat.
    """
    rtol, stol = newton_tolerances(dtype)
    defaults: dict[str, Any] = {"snes_rtol": rtol, "snes_stol": stol, "ksp_type": "gmres"}
    if parts.built is None:
        defaults["pc_type"] = "none"
    if parts.method.family == "rosw":
        defaults["ts_rosw_type"] = parts.method.petsc_name
    if linear:
        defaults |= {"snes_type": "ksponly", "ksp_rtol": rtol}
        if parts.state.getSize() <= _DIRECTLY_SOLVED and isinstance(parts.built, BuiltMatrix):
            defaults["pc_type"] = "lu" if parts.comm.size == 1 else "redundant"
            # Options for the iteration ask for an iterative solve.
            if not any(name.removeprefix("-").startswith("ksp_") for name in options):
                defaults["ksp_type"] = "preonly"
    given = PETSc.Options()
    return {name: value for name, value in defaults.items() if not given.hasName(name)}


def newton_tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative tolerances of residual and Newton step that an f of this type can reach."""
    if dtype == torch.float64:
        return 1e-9, 1e-12
    return (1e-5, 1e-7) if dtype == torch.float32 else (1e-2, 1e-3)


def stop_at_failure(ts: PETSc.TS) -> None:
    """Make `ts` return after a failed step. The caller decides what follows."""
    ts.setMaxSteps(MOST_STEPS)
    ts.setMaxTime(END_OF_TIME)
    ts.setErrorIfStepFails(False)
    # PETSc would reduce the step size by itself if the equations of a step cannot be solved.
    ts.setMaxSNESFailures(1)
    ts.setMaxStepRejections(0)


def chosen_method(ts: PETSc.TS, method: Method) -> Method:
    """Return the method of `ts` after its options were set: they may choose another table of the same family.

    Raises `ConfigurationError` for another type of TS.
    """
    chosen, wanted = ts.getType(), method.petsc_name if method.family == "theta" else _TYPES[method.family]
    if chosen != wanted:
        raise ConfigurationError(f"ts_type = {chosen!r}: must be {wanted!r} (choose the method by name)")
    if method.family not in ("arkimex", "dirk"):
        return method
    table = ts.getARKIMEXType() if method.family == "arkimex" else ts.getDIRKType()
    return by_table(method.family, table)


def theta_variant(ts: PETSc.TS) -> tuple[float, bool]:
    """Return theta, and True if the endpoints of the step are its stages. Not defined for other types of TS."""
    kind = ts.getType()
    if kind == PETSc.TS.Type.BEULER:
        return 1.0, False
    if kind == PETSc.TS.Type.CN:
        return 0.5, True
    if kind == PETSc.TS.Type.THETA:
        return float(ts.getTheta()), bool(ts.getThetaEndpoint())
    return 0.0, False


def failure_of(snes: PETSc.SNES) -> str:
    """Describe why the equations of a step could not be solved."""
    ksp = snes.getKSP()
    reason = snes.getConvergedReason()
    text = (
        f"the nonlinear solve ended with {reason_name(PETSc.SNES.ConvergedReason, reason)} after "
        f"{snes.getIterationNumber()} iterations, residual {snes.getFunctionNorm():.3g}"
    )
    if reason == PETSc.SNES.ConvergedReason.DIVERGED_LINEAR_SOLVE:
        text += f" (linear solve: {reason_name(PETSc.KSP.ConvergedReason, ksp.getConvergedReason())})"
    return text + ": make step_size smaller, give a preconditioner, or change PETSc's snes_* and ksp_* options"


def reason_name(reasons: Any, number: int) -> str:
    """Return PETSc's name of a reason for convergence or divergence."""
    names = [name for name, value in vars(reasons).items() if value == number and not name.startswith("_")]
    return max(names, key=len, default=str(number))
