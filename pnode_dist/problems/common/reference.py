"""Trajectories to a tight tolerance, by PETSc's own adaptive integrators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from petsc4py import PETSc

from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.partition import protocol
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc import vectors

Sample = TypeVar("Sample")

_METHOD = "5dp"
_TOLERANCE = 1e-9
_FIRST_STEP = 1e-2
_MOST_STEPS = 2**31 - 1


class NotIntegrableError(ArithmeticError):
    """The step control failed at the time `reached`."""

    def __init__(self, reached: float) -> None:
        super().__init__(f"cannot be integrated beyond time {reached:g}")
        self.reached = reached


def integrator(comm: Any, prefix: str, kind: str, most_steps: int, first_step: float) -> PETSc.TS:
    """A solver with step control, that stops exactly at the times it is asked for. Collective on `comm`.

    `prefix` is that of its options: those for the solver under study are not for this one.
    """
    ts = PETSc.TS().create(comm=comm)
    ts.setOptionsPrefix(prefix)
    ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
    ts.setType(kind)
    ts.setExactFinalTime(PETSc.TS.ExactFinalTime.MATCHSTEP)
    ts.setMaxSteps(most_steps)
    ts.setTimeStep(first_step)
    return ts


def sampled_solve(
    ts: PETSc.TS, solution: PETSc.Vec, times: Iterable[float], sample: Callable[[], Sample]
) -> list[Sample]:
    """The results of `sample()` at each of the increasing times, with `solution` solved up to it.

    Destroys the solver. Raises `NotIntegrableError` on all its ranks if the step control fails or the steps are too
    many.
    """
    samples = []
    try:
        for time in times:
            if time > ts.getTime():
                ts.setMaxTime(time)
                ts.solve(solution)
                if ts.getConvergedReason() != PETSc.TS.ConvergedReason.CONVERGED_TIME:
                    raise NotIntegrableError(ts.getTime())
            samples.append(sample())
    except PETSc.Error:
        raise NotIntegrableError(ts.getTime()) from None
    finally:
        ts.destroy()
    return samples


def reference(
    equations: Function, initial: torch.Tensor, times: int, interval: float, partition: Partition, prefix: str
) -> torch.Tensor:
    """The states at 0, `interval`, ..., `[times, *local_shape]`, starting from `initial`. Collective on the partition's
    communicator.

    Computed by PETSc's TS with the Dormand-Prince pair and step control at a relative and absolute tolerance of 1e-9.
    The steps follow from norms over all ranks, so that rank counts differ by rounding alone. `prefix` is that of its
    options. Raises `NotIntegrableError` on all ranks if the step control fails.
    """
    shape = partition.local_shape
    solution = vectors.create_vec(partition.comm, protocol.count(shape))
    state = vectors.view(solution, shape)

    def rates(ts: Any, t: float, u: PETSc.Vec, rate: PETSc.Vec) -> None:
        with torch.no_grad():
            vectors.view(rate, shape).copy_(equations(torch.tensor(t), vectors.view(u, shape)))
        rate.stateIncrease()

    ts = integrator(partition.comm, prefix, PETSc.TS.Type.RK, _MOST_STEPS, min(_FIRST_STEP, interval))
    ts.setRKType(_METHOD)
    ts.setRHSFunction(rates, solution.duplicate())
    ts.setTolerances(rtol=_TOLERANCE, atol=_TOLERANCE)
    state.copy_(initial)
    solution.stateIncrease()
    return torch.stack(sampled_solve(ts, solution, [number * interval for number in range(times)], state.clone))
