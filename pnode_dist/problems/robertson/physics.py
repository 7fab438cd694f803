"""Robertson's reactions, their initial states, and their solution by PETSc to a tight tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.steppers.base import options_database
from pnode_dist.problems.common.reference import NotIntegrableError, integrator, sampled_solve

Array = npt.NDArray[np.float64]

SPECIES = ("A", "B", "C")
AS_PUBLISHED = (1.0, 0.0, 0.0)
_PREFIX = "robertson_data_"
_METHOD = "5"
_RTOL, _ATOL = 1e-9, (1e-11, 1e-15, 1e-11)
_FIRST_STEP = 1e-8
_MOST_STEPS = 1_000_000


def reaction_rates(concentrations: Array, rates: Sequence[float]) -> Array:
    """Return dy/dt `[..., 3]` of the concentrations y `[..., 3]` for the rate constants k1, k2, k3."""
    a, b, c = concentrations[..., 0], concentrations[..., 1], concentrations[..., 2]
    decay, doubling, return_ = rates[0] * a, rates[1] * b * b, rates[2] * b * c
    result = np.empty_like(concentrations)
    result[..., 0] = return_ - decay
    result[..., 1] = decay - return_ - doubling
    result[..., 2] = doubling
    return result


def reaction_jacobian(concentrations: Array, rates: Sequence[float]) -> Array:
    """Return the Jacobian `[..., 3, 3]` of `reaction_rates` with respect to the concentrations `[..., 3]`."""
    k1, k2, k3 = rates
    result = np.zeros((*concentrations.shape, 3))
    result[..., 0, 0], result[..., 1, 0] = -k1, k1
    result[..., 0, 1] = k3 * concentrations[..., 2]
    result[..., 0, 2] = k3 * concentrations[..., 1]
    result[..., 2, 1] = 2 * k2 * concentrations[..., 1]
    result[..., 1, 1] = -result[..., 0, 1] - result[..., 2, 1]
    result[..., 1, 2] = -result[..., 0, 2]
    return result


def initial_concentrations(lowest: Sequence[float], highest: Sequence[float], seed: int, number: int) -> Array:
    """Draw the initial concentrations `[3]` for `seed` and `number`, uniform between `lowest` and `highest`."""
    return np.random.default_rng([seed, number]).uniform(lowest, highest)


def reference(initial: Array, times: Sequence[float], rates: Sequence[float], atol: Sequence[float] = _ATOL) -> Array:
    """Return the concentrations `[time, trajectory, 3]` at increasing, positive `times`.

    `initial` `[trajectory, 3]` are the concentrations at time 0. The integrator is PETSc's TS with the fully implicit
    part of ARKIMEX 5 (C. A. Kennedy, M. H. Carpenter, Appl. Numer. Math. 44 (2003)) and Newton's method with the exact
    Jacobian. Step control uses a relative tolerance of 1e-9 and the absolute tolerances `atol` `[3]` for each
    concentration. Not collective. Raises `ConfigurationError` if step control fails.
    """
    size = initial.size
    solution = PETSc.Vec().createSeq(size, comm=PETSc.COMM_SELF)
    starts, columns = _block_diagonal(len(initial), initial.shape[-1])
    jacobian = PETSc.Mat().createAIJ((size, size), csr=(starts, columns, np.ones(len(columns))), comm=PETSc.COMM_SELF)

    def residual(ts: Any, t: float, u: PETSc.Vec, slope: PETSc.Vec, result: PETSc.Vec) -> None:
        concentrations = u.array_r.reshape(initial.shape)
        result.array[:] = slope.array_r - reaction_rates(concentrations, rates).reshape(-1)

    def derivative(
        ts: Any, t: float, u: PETSc.Vec, slope: PETSc.Vec, shift: float, matrix: PETSc.Mat, operator: PETSc.Mat
    ) -> None:
        blocks = shift * np.eye(initial.shape[-1]) - reaction_jacobian(u.array_r.reshape(initial.shape), rates)
        operator.setValuesCSR(starts, columns, blocks.reshape(-1))
        operator.assemble()

    ts = integrator(PETSc.COMM_SELF, _PREFIX, PETSc.TS.Type.ARKIMEX, _MOST_STEPS, min(_FIRST_STEP, times[0] / 10))
    ts.setARKIMEXType(_METHOD)
    ts.setARKIMEXFullyImplicit(True)
    ts.setIFunction(residual, solution.duplicate())
    ts.setIJacobian(derivative, jacobian, jacobian)
    smallest = solution.duplicate()
    smallest.array[:] = np.tile(atol, len(initial))
    ts.setTolerances(rtol=_RTOL, atol=smallest)
    ts.getSNES().setTolerances(rtol=1e-10, atol=0.0, stol=1e-12)
    ksp = ts.getSNES().getKSP()
    ksp.setType(PETSc.KSP.Type.PREONLY)
    ksp.getPC().setType(PETSc.PC.Type.LU)
    # The tolerance applies to each trajectory, not to their mean.
    with options_database({f"{_PREFIX}ts_adapt_wnormtype": "infinity"}):
        ts.setFromOptions()
    solution.array[:] = initial.reshape(-1)
    try:
        return np.stack(sampled_solve(ts, solution, times, lambda: solution.array_r.reshape(initial.shape).copy()))
    except NotIntegrableError as error:
        raise ConfigurationError(
            f"[problem]: the reactions cannot be followed beyond time {error.reached:g}: rates, highest or last is too "
            "large"
        ) from None


def _block_diagonal(blocks: int, size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the row starts and columns of a block diagonal matrix in compressed row format."""
    starts = np.arange(0, blocks * size * size + 1, size, dtype=np.int32)
    columns = np.arange(blocks * size, dtype=np.int32).reshape(blocks, 1, size)
    return starts, np.broadcast_to(columns, (blocks, size, size)).reshape(-1)
