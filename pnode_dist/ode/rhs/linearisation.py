"""A part of the right-hand side at one state, and its derivatives there as products with flat vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from pnode_dist.ode.rhs import products
from pnode_dist.ode.rhs.evaluation import BoundFunction, Function, StageGraph, StageState
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.products import Cotangents, TangentMap, step_cotangents
from pnode_dist.ode.rhs.split import MatrixFunction


class Part(Enum):
    """A part of the right-hand side."""

    IMPLICIT = "implicit"
    EXPLICIT = "explicit"


Place = tuple[Part, int]
"""A part of the right-hand side at the state in the Vec of this handle."""


@dataclass
class Point:
    """A part of the right-hand side at one state, to be differentiated there. `time` is the caller's.

    `sign` is -1 for a solve that goes backward in time, in which PETSc integrates -f(-s, u). `kept` is the stage of the
    forward pass that a recomputed value is compared with.
    """

    bound: BoundFunction
    func: Function
    layout: StateLayout
    sign: float
    time: float
    inputs: Parts
    graph: StageGraph | None = None
    kept: StageState | None = None
    _batches: bool = True
    _tangents: TangentMap | None = field(default=None, repr=False)

    def jvp(self, flat: torch.Tensor) -> torch.Tensor:
        """Multiply the Jacobian with respect to the state by a flat vector. Collective if the function is."""
        if isinstance(self.func, MatrixFunction):
            return self.sign * self.func.multiply(flat, transposed=False)
        if self._tangents is None:
            self._tangents = products.tangent_map(self.bound, self._linearised())
        found = self._tangents(self.layout.parts(flat))
        return self.sign * torch.cat([part.reshape(-1).to(flat) for part in found])

    def vjp(self, flat: torch.Tensor) -> torch.Tensor:
        """Multiply the transposed Jacobian with respect to the state by a flat vector. Collective like the function."""
        if isinstance(self.func, MatrixFunction):
            return self.sign * self.func.multiply(flat, transposed=True)
        return self._state_product(
            products.vjp(self.bound, self._linearised(), self._parts(flat), parameters=False, keep=True), flat
        )

    def vjp_with_parameters(self, flat: torch.Tensor, start: float) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return `vjp` and `parameter_products` of one vector, from one backward pass. Collective like the function."""
        if isinstance(self.func, MatrixFunction):
            return self.vjp(flat), self.parameter_products(flat, start)
        found = products.vjp(self.bound, self._linearised(), self._parts(flat), keep=True)
        return self._state_product(found, flat), self._parameter_products(found, start)

    def vjps(self, flats: torch.Tensor) -> torch.Tensor:
        """Multiply the transposed Jacobian with respect to the state by each row of `flats`, in a batch if possible."""
        if not isinstance(self.func, MatrixFunction) and self._batches:
            try:
                return self.sign * products.batched_vjp(self.bound, self._linearised(), self.layout, flats)
            except RuntimeError:
                # An operation of func has no rule for batches.
                self._batches = False
        return torch.stack([self.vjp(flat) for flat in flats])

    def parameter_products(self, flat: torch.Tensor, start: float) -> list[torch.Tensor | None]:
        """Multiply the transposed derivative with respect to each parameter by a flat vector.

        With time gradients, the products of `step_cotangents` follow.
        """
        if isinstance(self.func, MatrixFunction):
            found = self._of_matrix(self.func, flat)
        else:
            found = products.vjp(self.bound, self._linearised(), self._parts(flat), states=False, keep=True)
        return self._parameter_products(found, start)

    def _state_product(self, found: Cotangents, flat: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                torch.zeros(part.numel(), dtype=flat.dtype) if value is None else value.reshape(-1).to(flat)
                for part, value in zip(self.inputs, found.states, strict=True)
            ]
        )

    def _parameter_products(self, found: Cotangents, start: float) -> list[torch.Tensor | None]:
        found_products = list(found.parameters)
        if self.bound.needs_time_gradient:
            found_products += step_cotangents(found, self.time - start)
        return found_products

    def _of_matrix(self, func: MatrixFunction, flat: torch.Tensor) -> Cotangents:
        none = (None,) * len(self.bound.parameters.tensors)
        if not self.bound.needs_time_gradient:
            return Cotangents((), none, None, None)
        value = func.multiply(torch.cat([part.reshape(-1) for part in self.inputs]).to(flat), False)
        return Cotangents((), none, self.sign * torch.dot(value, flat), None)

    def _parts(self, flat: torch.Tensor) -> Parts:
        return self.layout.parts(flat if self.sign > 0 else -flat)

    def _linearised(self) -> StageGraph:
        if self.graph is None:
            if self.kept is None:
                self.graph = self.bound.graph(self.func, self.layout, self.time, self.inputs)
            else:
                self.graph = self.bound.recomputed_graph(self.kept, self.func, self.layout)
        return self.graph
