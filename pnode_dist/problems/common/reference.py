"""Trajectories to a tight tolerance, by PETSc's own adaptive integrator."""

from __future__ import annotations

from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import vectors

_METHOD = "5dp"
_TOLERANCE = 1e-9
_FIRST_STEP = 1e-2
_MOST_STEPS = 2**31 - 1


class NotIntegrableError(ArithmeticError):
    """The step control gave up at the time `reached`."""

    def __init__(self, reached: float) -> None:
        super().__init__(f"cannot be integrated beyond time {reached:g}")
        self.reached = reached


def reference(
    equations: Function, initial: torch.Tensor, times: int, interval: float, partition: Partition, prefix: str
) -> torch.Tensor:
    """The states at 0, `interval`, ..., `[times, *local_shape]`, starting from `initial`. Collective on the partition's
    communicator.

    Computed by PETSc's TS with the Dormand-Prince pair and step control at a relative and absolute tolerance of 1e-9.
    The steps follow from norms over all ranks, so that rank counts differ by rounding alone. `prefix` is that of its
    options: those for the solver under study are not for this one.
    Raises `NotIntegrableError` on all ranks where the step control gives up.
    """
    shape = partition.local_shape
    solution = vectors.create_vec(partition.comm, protocol.count(shape))
    state = vectors.view(solution, shape)

    def rates(ts: Any, t: float, u: PETSc.Vec, rate: PETSc.Vec) -> None:
        with torch.no_grad():
            vectors.view(rate, shape).copy_(equations(torch.tensor(t), vectors.view(u, shape)))
        rate.stateIncrease()

    ts = PETSc.TS().create(comm=partition.comm)
    ts.setOptionsPrefix(prefix)
    ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
    ts.setType(PETSc.TS.Type.RK)
    ts.setRKType(_METHOD)
    ts.setRHSFunction(rates, solution.duplicate())
    ts.setTolerances(rtol=_TOLERANCE, atol=_TOLERANCE)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
    ts.setMaxSteps(_MOST_STEPS)
    ts.setTimeStep(min(_FIRST_STEP, interval))
    state.copy_(initial)
    solution.stateIncrease()
    samples = [state.clone()]
    try:
        for number in range(1, times):
            ts.setMaxTime(number * interval)
            ts.solve(solution)
            samples.append(state.clone())
    except PETSc.Error:
        raise NotIntegrableError(ts.getTime()) from None
    finally:
        ts.destroy()
    return torch.stack(samples)
