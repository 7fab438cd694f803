"""Data of the semilinear problems: trajectories computed from the equations by PETSc's adaptive IMEX scheme."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.reference import NotIntegrableError, integrator, sampled_solve
from pnode_dist.problems.semilinear.config import LineConfig, LineEquation
from pnode_dist.problems.semilinear.equation import convection_stencil, initial_state, linear_stencil
from pnode_dist.problems.semilinear.periodic_line import line, operator

_METHOD = "5"
_TOLERANCE = 1e-8
_FIRST_STEP = 1e-3
_MOST_STEPS = 100_000
_PREFIX = "semilinear_data_"


def generate(config: LineConfig, mesh: Mesh) -> torch.Tensor:
    """Compute all trajectories `[trajectory, time, points]` on the whole line, training trajectories first.

    Each trajectory is computed by one rank, so that it has the same bits at every number of ranks. The trajectories are
    distributed over the ranks. Collective on the world. Raises `ConfigurationError` on all ranks if one of them cannot
    be integrated.
    """
    count = config.trajectories + config.validation
    own = agreed(mesh, lambda: {number: _trajectory(config, number) for number in range(mesh.rank, count, mesh.size)})
    return torch.stack([mesh.broadcast_object(own.get(number), source=number % mesh.size) for number in range(count)])


def _trajectory(config: LineConfig, number: int) -> torch.Tensor:
    equation = config.equation
    initial = torch.from_numpy(initial_state(equation, config.points, config.seed, number))
    return reference(equation, initial, config.times, config.interval, config.spin_up)


def reference(
    equation: LineEquation, initial: torch.Tensor, times: int, interval: float, spin_up: float = 0.0
) -> torch.Tensor:
    """Return the states of the whole line `[times, points]` at `spin_up`, `spin_up + interval`, ... Not collective.

    Space is discretised with the stencils of `pnode_dist.problems.semilinear.equation`. The integrator is PETSc's
    ARKIMEX scheme of order 5, with the linear part implicit and factored, and step control at a relative and absolute
    tolerance of 1e-8. Raises `ConfigurationError` if step control fails or the number of steps exceeds its limit.
    """
    points = len(initial)
    partition = line(MPI.COMM_SELF, points)
    linear = operator(partition, linear_stencil(equation, points))
    convection = operator(partition, convection_stencil(equation, points))
    solution, squares = partition.create_vec(), partition.create_vec()
    state = partition.view(solution)
    jacobian = linear.duplicate(copy=True)
    factored: float | None = None

    def explicit(ts: Any, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        squares.pointwiseMult(u, u)
        convection.mult(squares, f)

    def implicit(ts: Any, t: float, u: PETSc.Vec, udot: PETSc.Vec, f: PETSc.Vec) -> None:
        linear.mult(u, f)
        f.aypx(-1.0, udot)

    def implicit_jacobian(
        ts: Any, t: float, u: PETSc.Vec, udot: PETSc.Vec, shift: float, a: PETSc.Mat, p: PETSc.Mat
    ) -> None:
        nonlocal factored
        if shift == factored:
            return
        factored = shift
        linear.copy(p, structure=PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        p.scale(-1.0)
        p.shift(shift)

    ts = integrator(MPI.COMM_SELF, _PREFIX, PETSc.TS.Type.ARKIMEX, _MOST_STEPS, min(_FIRST_STEP, interval))
    ts.setARKIMEXType(_METHOD)
    ts.setEquationType(PETSc.TS.EquationType.EXPLICIT)
    ts.setRHSFunction(explicit, solution.duplicate())
    ts.setIFunction(implicit, solution.duplicate())
    ts.setIJacobian(implicit_jacobian, jacobian)
    ts.setTolerances(rtol=_TOLERANCE, atol=_TOLERANCE)
    snes = ts.getSNES()
    snes.setType(PETSc.SNES.Type.KSPONLY)
    snes.ksp.setType(PETSc.KSP.Type.PREONLY)
    snes.ksp.pc.setType(PETSc.PC.Type.LU)
    state.copy_(initial.view(state.shape))
    solution.stateIncrease()
    sampled = [spin_up + number * interval for number in range(times)]
    try:
        return torch.stack(sampled_solve(ts, solution, sampled, lambda: state.flatten().clone()))
    except NotIntegrableError as error:
        raise ConfigurationError(
            f"[problem]: the {equation.title} equation on {points} points {error} in {_MOST_STEPS} steps of an "
            f"accuracy of {_TOLERANCE:g}: use more points, or shorter trajectories"
        ) from None
