"""The equations of a steady state as PETSc's callbacks: residual, Jacobian, and preconditioner.

The residual is R(u) = -f(u). Phase conditions with the orthonormal rows V replace the components of f along them:
R(u) = -f(u) + V^T V (f(u) + u - u0). With deflation PETSc solves G(u) = M(u) R(u) = 0, whose Jacobian is
M dR/du + R (dM/du). Both conditions change the Jacobian by a matrix of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.ode.rhs.evaluation import BoundFunction, StageGraph
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.linearisation import Point
from pnode_dist.petsc import unwinding, vectors
from pnode_dist.steady.conditions import Deflation, Phase, sums
from pnode_dist.steady.low_rank import LowRank
from pnode_dist.steady.preconditioning import Preconditioning

_REGULAR = 1e-7


@dataclass
class Linearisation:
    """The Jacobian shift I + M dR/du + R (dM/du)^T at one state. `slope` is dM/du, None without deflation."""

    point: Point
    comm: MPI.Comm
    phase: Phase | None
    shift: float = 0.0
    factor: float = 1.0
    residual: torch.Tensor | None = None
    slope: torch.Tensor | None = None

    def times(self, flat: torch.Tensor) -> torch.Tensor:
        """Multiply the Jacobian by a flat state. Collective."""
        product = self.point.jvp(flat)
        found = -product
        if self.phase is not None:
            found += self.phase.combined(self.phase.along(product + flat))
        if self.slope is not None and self.residual is not None:
            found = self.factor * found + self.residual * sums(self.comm, self.slope @ flat)
        return found.add_(flat, alpha=self.shift)

    def transposed_times(self, flat: torch.Tensor) -> torch.Tensor:
        """Multiply the transposed Jacobian by a flat state. Collective."""
        if self.phase is None:
            found = -self.point.vjp(flat)
        else:
            held = self.phase.combined(self.phase.along(flat))
            found = held - self.point.vjp(flat - held)
        if self.slope is not None and self.residual is not None:
            found = self.factor * found + self.slope * sums(self.comm, self.residual @ flat)
        return found.add_(flat, alpha=self.shift)

    def base_shift(self) -> float:
        """Return the shift at which shift I - df/du is preconditioned. Collective.

        With phase conditions df/du is singular, so the shift is a small part of its size.
        """
        return self.shift if self.phase is None else self.shift + (_REGULAR * self.size() or 1.0)

    def size(self) -> float:
        """Return an estimate of the size of df/du: the factor by which a wavy vector grows. Collective."""
        layout = self.point.layout
        probe = torch.cos(torch.arange(layout.size, dtype=layout.state_dtype))
        product = self.point.jvp(probe)
        grown, length = sums(self.comm, torch.stack([product @ product, probe @ probe])).sqrt().tolist()
        return float(grown / length)

    def low_rank(self) -> LowRank | None:
        """Return the part of the Jacobian beside factor (shift I - df/du), None if there is none. Collective."""
        left, right = [], []
        if self.phase is not None:
            for vector in self.phase.vectors:
                left.append(self.factor * vector)
                right.append(vector + self.point.vjp(vector))
        if self.slope is not None and self.residual is not None:
            left.append(self.residual)
            right.append(self.slope)
        return LowRank(self.comm, self.factor, torch.stack(left), torch.stack(right)) if left else None


class SteadySystem:
    """The equations of one steady state. `time` is that of f, `error` the exception that a callback raised.

    `linearisation` is that of the last Jacobian, and `preconditioning` that of the solve in progress, or None.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        layout: StateLayout,
        bound: BoundFunction,
        time: float,
        phase: Phase | None,
        deflation: Deflation | None,
    ) -> None:
        self.comm, self.layout, self.bound, self.time = comm, layout, bound, time
        self.phase, self.deflation = phase, deflation
        self.preconditioning: Preconditioning | None = None
        self.linearisation: Linearisation | None = None
        self.error: BaseException | None = None

    def value(self, flat: torch.Tensor) -> torch.Tensor:
        """Return f at a flat state, flat and in the type of the solve. Collective."""
        bound, layout = self.bound, self.layout
        values = bound.value(bound.func, layout, self.time, layout.inputs(layout.parts(flat)))
        return self._flat(values)

    def residual(self, flat: torch.Tensor) -> torch.Tensor:
        """Return R at a flat state, without the factor of deflation. Collective."""
        return self._residual_of(flat, self.value(flat))

    def _residual_of(self, flat: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.phase is None:
            return -value
        return self.phase.combined(self.phase.along(value + (flat - self.phase.start))) - value

    def norm(self, flat: torch.Tensor) -> float:
        """Return the 2-norm of a flat state over all ranks. Collective."""
        return math.sqrt(float(sums(self.comm, flat @ flat)))

    def graph(self, flat: torch.Tensor) -> StageGraph:
        """Evaluate f at a flat state with its graph. Collective."""
        layout = self.layout
        inputs = layout.inputs(layout.parts(flat), copy=True)
        return self.bound.graph(self.bound.func, layout, self.time, inputs)

    def point(self, graph: StageGraph) -> Point:
        """Return f at the state of a graph, to be differentiated there."""
        return Point(self.bound, self.bound.func, self.layout, 1.0, self.time, graph.inputs, graph)

    def linearise(self, flat: torch.Tensor, shift: float) -> None:
        """Set the Jacobian to that at a flat state, and update the preconditioner. Collective."""
        graph = self.graph(flat)
        linearisation = Linearisation(self.point(graph), self.comm, self.phase, shift)
        if self.deflation is not None:
            linearisation.factor, linearisation.slope = self.deflation.factor_and_gradient(flat)
            linearisation.residual = self._residual_of(flat, self._flat(graph.values))
        self.use(linearisation)

    def use(self, linearisation: Linearisation) -> None:
        """Set the Jacobian, and update the preconditioner. Collective."""
        self.linearisation = linearisation
        if self.preconditioning is not None:
            self.preconditioning.update(linearisation.point, linearisation.base_shift(), linearisation.low_rank())

    def _flat(self, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([self.layout.scalar(value.detach()).reshape(-1) for value in values])

    def _view(self, vec: PETSc.Vec) -> torch.Tensor:
        return vectors.view(vec, (self.layout.size,))

    # The callbacks. PETSc turns an exception into an error code. `errors` raises the exception stored here instead.

    def function(self, snes: PETSc.SNES, u: PETSc.Vec, result: PETSc.Vec) -> None:
        """SNESFunction: result = M(u) R(u)."""
        with self.stored():
            flat = self._view(u)
            found = self.residual(flat)
            if self.deflation is not None:
                found *= self.deflation.factor(flat)
            vectors.fill(result, found)

    def jacobian(self, snes: PETSc.SNES, u: PETSc.Vec, operator: PETSc.Mat, matrix: PETSc.Mat) -> None:
        """SNESJacobian: linearise at u."""
        with self.stored():
            self.linearise(self._view(u), 0.0)
            operator.assemble()

    def transient(self, ts: PETSc.TS, t: float, u: PETSc.Vec, udot: PETSc.Vec, result: PETSc.Vec) -> None:
        """TSIFunction: result = du/dt + R(u). The time of f stays `time`."""
        with self.stored():
            vectors.fill(result, self._view(udot) + self.residual(self._view(u)))

    def transient_jacobian(
        self,
        ts: PETSc.TS,
        t: float,
        u: PETSc.Vec,
        udot: PETSc.Vec,
        shift: float,
        operator: PETSc.Mat,
        matrix: PETSc.Mat,
    ) -> None:
        """TSIJacobian: linearise at u with `shift`."""
        with self.stored():
            self.linearise(self._view(u), shift)
            operator.assemble()

    @contextmanager
    def stored(self) -> Iterator[None]:
        """The context of a callback: stores its exception for `errors`."""
        try:
            yield
        except BaseException as error:
            self.error = unwinding.begin(error)
            raise

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The context of PETSc's calls: raises the exception of a callback instead of PETSc's error code."""
        try:
            yield
        except BaseException:
            if self.error is None:
                raise
            raise self.error from None
        finally:
            unwinding.end()
            self.error = None
