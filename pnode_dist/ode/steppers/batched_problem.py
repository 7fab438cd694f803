"""The equations of a batch of small systems: their right-hand side, its blocks, and the samples of a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from mpi4py import MPI

from pnode_dist.ode.rhs import products
from pnode_dist.ode.rhs.evaluation import BoundFunction, Function, StageGraph
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.steppers.additive_tableau import AdditiveTableau
from pnode_dist.ode.steppers.batched_newton import NewtonTolerances
from pnode_dist.ode.steppers.batched_samples import parts_of
from pnode_dist.ode.steppers.irk.tableau import IrkTableau
from pnode_dist.ode.steppers.traced_implicit import ROUNDING
from pnode_dist.petsc import vectors


@dataclass(frozen=True)
class BatchProblem:
    """The equations of a batch: the right-hand side, the method, and the split of a state into samples.

    `samples` is this rank's number of samples, and `widths` are the numbers of components that each part of the state
    has in a sample. `implicit` and `explicit` are the parts of the right-hand side; the second is None if all of it is
    implicit. `mass`
    are the blocks of M `[1 or sample, row, column]`, None for the identity. Ranks of `comm` share the batch.
    """

    bound: BoundFunction
    layout: StateLayout
    comm: MPI.Comm
    samples: int
    widths: tuple[int, ...]
    implicit: Function
    explicit: Function | None
    tableau: AdditiveTableau | IrkTableau
    mass: torch.Tensor | None
    tolerances: NewtonTolerances

    @property
    def components(self) -> int:
        """The number of components of a sample."""
        return sum(self.widths)

    @property
    def additive(self) -> AdditiveTableau:
        """The method, whose stages are solved one after the other."""
        assert isinstance(self.tableau, AdditiveTableau)
        return self.tableau

    @property
    def irk(self) -> IrkTableau:
        """The method, whose stages are solved at once."""
        assert isinstance(self.tableau, IrkTableau)
        return self.tableau

    @cached_property
    def mass_of_stages(self) -> torch.Tensor:
        """W (x) M `[1 or sample, row, column]` of a method whose stages are solved at once."""
        mass = torch.eye(self.components, dtype=vectors.scalar_dtype()).unsqueeze(0) if self.mass is None else self.mass
        size = self.irk.stages * self.components
        return torch.einsum("ij,sab->siajb", self.irk.inverse, mass).reshape(len(mass), size, size)

    def joined(self, parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return parts of a state, or of a product with f's derivative, as `[sample, component]`. None is zero."""
        pieces = [
            torch.zeros(self.samples, width, dtype=vectors.scalar_dtype())
            if part is None
            else self.layout.scalar(part.detach()).reshape(self.samples, width)
            for part, width in zip(parts, self.widths, strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def parts(self, states: torch.Tensor) -> Parts:
        """Return the parts of a state `[sample, component]`, in PETSc's scalar type."""
        return parts_of(states, self.layout, self.widths)

    def inputs(self, states: torch.Tensor) -> Parts:
        """Return the parts of a state in f's floating type and on its device."""
        return self.layout.inputs(self.parts(states))


def value(problem: BatchProblem, func: Function, when: float, states: torch.Tensor) -> torch.Tensor:
    """Return a part of the right-hand side at a state. Collective if it is."""
    return problem.joined(problem.bound.value(func, problem.layout, when, problem.inputs(states)))


def linearised(problem: BatchProblem, when: float, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the implicit part at a state, and its blocks `[sample, row, column]`. Collective if the part is."""
    graph = problem.bound.graph(problem.implicit, problem.layout, when, problem.inputs(states))
    return problem.joined(graph.values), jacobians(problem, graph)


def jacobians(problem: BatchProblem, graph: StageGraph) -> torch.Tensor:
    """Return the blocks `[sample, row, column]` of a recorded evaluation. Collective if the function's backward is.

    Row c holds the derivatives of component c of all samples, from one vector-Jacobian product for each component.
    """
    samples, components = problem.samples, problem.components
    seeds = torch.eye(components, dtype=vectors.scalar_dtype()).unsqueeze(1).expand(components, samples, components)
    return transposed_products(problem, graph, seeds).transpose(0, 1)


def transposed_products(problem: BatchProblem, graph: StageGraph, along: torch.Tensor) -> torch.Tensor:
    """Multiply the transposed derivative by vectors `[vector, sample, component]`, in a batch if torch can.

    Collective if the function's backward is.
    """
    bound, layout, count = problem.bound, problem.layout, len(along)
    if bound.batches:
        pieces = torch.split(along, list(problem.widths), dim=-1)
        try:
            rows = products.batched_vjp(bound, graph, layout, torch.cat([p.reshape(count, -1) for p in pieces], dim=1))
        except RuntimeError:
            # An operation of f has no rule for batches.
            bound.batches = False
        else:
            parts = zip(torch.split(rows, list(layout.sizes), dim=1), problem.widths, strict=True)
            return torch.cat([part.reshape(count, problem.samples, width) for part, width in parts], dim=-1)
    found = [products.vjp(bound, graph, problem.parts(one), parameters=False, keep=True) for one in along]
    return torch.stack([problem.joined(one.states) for one in found])


def are_coupled(problem: BatchProblem, when: float, size: float, states: torch.Tensor) -> bool:
    """Return True if a sample's part of the implicit function depends on another sample, on any rank. Collective.

    Compares the product of a random vector and the transposed derivative with that of its blocks. They differ with
    probability 1 if the derivative has any other entry.
    """
    generator = torch.Generator().manual_seed(problem.comm.rank)
    vector = torch.rand(states.shape, dtype=states.dtype, generator=generator).add_(0.5)
    graph = problem.bound.graph(problem.implicit, problem.layout, when, problem.inputs(states))
    blocks = jacobians(problem, graph)
    (product,) = transposed_products(problem, graph, vector.unsqueeze(0))
    difference = (product - multiplied_transposed(blocks, vector)).abs()
    scale = multiplied_transposed(blocks.abs(), vector) + product.abs()
    eps = torch.finfo(problem.layout.compute_dtype).eps
    return not holds(not bool((difference > ROUNDING * eps * scale).any()), problem.comm)


def holds(condition: bool, comm: MPI.Comm) -> bool:
    """Return True if the condition holds on all ranks. Collective."""
    return condition if comm.size == 1 else bool(comm.allreduce(condition, MPI.LAND))


def multiplied(mass: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """Return M u for the blocks of M; None is the identity."""
    return states if mass is None else torch.matmul(mass, states.unsqueeze(-1)).squeeze(-1)


def multiplied_transposed(mass: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """Return M^T u for the blocks of M; None is the identity."""
    return states if mass is None else torch.matmul(mass.mT, states.unsqueeze(-1)).squeeze(-1)
