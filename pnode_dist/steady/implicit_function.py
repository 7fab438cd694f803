"""The preparation of a steady state on all ranks, its solve, and its gradient by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.autograd.transforms import check_not_traced, transforming
from pnode_dist.ode.call_agreement import Agreed, Alone, Facts, Preparation, preparation, state_shape
from pnode_dist.ode.prepare import usable_outside_inference
from pnode_dist.ode.rhs.compute_dtype import ComputeCopies, compute_copies
from pnode_dist.ode.rhs.evaluation import BoundFunction, Function, StageGraph
from pnode_dist.ode.rhs.fully_sharded import refuse_fully_sharded
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, for_method, layout_of
from pnode_dist.ode.rhs.parameters import find_parameters, independent
from pnode_dist.ode.rhs.tangent import in_compute_type
from pnode_dist.ode.solve_lock import solve_lock
from pnode_dist.ode.solver import communicator
from pnode_dist.ode.steppers.preconditioner import resolve
from pnode_dist.petsc import calls
from pnode_dist.petsc.objects import destroy_left
from pnode_dist.steady.conditions import deflation_of, flat_states, phase_of
from pnode_dist.steady.linear import transposed_solve
from pnode_dist.steady.settings import SteadySettings
from pnode_dist.steady.solve import SteadyState, solve
from pnode_dist.steady.system import SteadySystem


@outside_graphs
def find(
    func: Function, u0: State, settings: SteadySettings | None = None, *, args: tuple[Any, ...] = ()
) -> SteadyState:
    """Return the steady state that `steady_state` returns, with the counts of its solve. Collective.

    Raises what `steady_state` raises.
    """
    settings = SteadySettings() if settings is None else settings
    check_not_traced()
    if torch.is_inference_mode_enabled():
        # Newton's method differentiates f, which inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            return find(func, usable_outside_inference(u0), settings, args=usable_outside_inference(args))
    with solve_lock():
        with preparation(communicator(getattr(settings, "partition", None)), "steady state") as preparing:
            prepared = _prepared_with(preparing, func, u0, settings, args)
        calls.one_blas_thread()
        return _found(prepared)


@dataclass(frozen=True)
class _Prepared:
    """A steady state whose arguments all ranks have checked and compared.

    `known` and `vectors` are the rows of `deflate` and `phase`. `parameters` are the originals of those of `bound`.
    """

    settings: SteadySettings
    layout: StateLayout
    parts: Parts
    bound: BoundFunction
    parameters: Parts
    known: torch.Tensor
    vectors: torch.Tensor
    needs_gradient: bool
    agreed: Agreed | None


def _prepared_with(
    preparing: Preparation | Alone, func: Function, u0: State, settings: SteadySettings, args: tuple[Any, ...]
) -> _Prepared:
    if not isinstance(settings, SteadySettings):
        raise ConfigurationError(f"settings = {settings!r}: must be a pnode_dist.steady.SteadySettings, or None")
    if transforming():
        raise ConfigurationError(
            "steady_state: not available under torch's transforms or in forward mode: take an ordinary backward pass"
        )
    settings.check()
    resolve(settings.preconditioner)
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, u), got {type(func).__name__}")
    layout, parts = layout_of(u0, settings.compute_dtype)
    layout = for_method(layout, methods.resolve("beuler"), None)
    known = flat_states("deflate", settings.deflate, layout)
    vectors = flat_states("phase", settings.phase, layout)
    parameters = independent(find_parameters(func, (*args, *(settings.params or ()))))
    inputs = (*parts, *parameters.tensors)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if needs_gradient:
        refuse_fully_sharded(func, args, parameters.tensors)
    copies = ComputeCopies({}, (), args)
    if settings.compute_dtype is not None:
        copies = compute_copies(func, args, layout.compute_dtype)
    agreed = None
    if isinstance(preparing, Preparation):
        agreed = preparing.agree(_facts(settings, layout, len(known), len(vectors), needs_gradient), True, [])
    bound = BoundFunction(
        in_compute_type(func, copies),
        copies.args,
        replace(parameters, tensors=copies.of(parameters.tensors)) if copies.by_original else parameters,
        copies,
        watched=torch.is_grad_enabled() and not needs_gradient,
    )
    return _Prepared(settings, layout, parts, bound, parameters.tensors, known, vectors, needs_gradient, agreed)


def _facts(settings: SteadySettings, layout: StateLayout, known: int, vectors: int, needs_gradient: bool) -> Facts:
    """Return the facts of a steady state that ranks compare."""
    assert settings.partition is not None
    options = sorted((str(name), repr(value)) for name, value in (settings.options or {}).items())
    return (
        ("method", settings.solver),
        ("state", state_shape(layout.shapes, settings.partition)),
        ("dtype", layout.dtype),
        ("compute_dtype", layout.compute_dtype),
        ("t", (float(settings.t),)),
        *((name, getattr(settings, name)) for name in ("rtol", "atol", "stol", "max_it", "step_size")),
        ("preconditioner", type(resolve(settings.preconditioner)).__name__),
        ("number of states in deflate", known),
        ("number of vectors in phase", vectors),
        ("options", ", ".join(f"{name} = {value}" for name, value in options)),
        ("gradient", needs_gradient),
    )


def _found(prepared: _Prepared) -> SteadyState:
    """Solve, and return the state as a node of torch's graph. Collective."""
    settings, layout, bound = prepared.settings, prepared.layout, prepared.bound
    comm = communicator(settings.partition)
    destroy_left(comm)
    with torch.no_grad(), bound.copies.in_place():
        start = torch.cat([layout.scalar(part.detach()).reshape(-1) for part in prepared.parts])
        conditions = phase_of(comm, prepared.vectors, start), deflation_of(comm, prepared.known, start)
        system = SteadySystem(comm, layout, bound, float(settings.t), *conditions)
        outcome = solve(system, settings, start)
        graph = system.graph(outcome.flat) if prepared.needs_gradient else None
        parts = tuple(part.to(layout.device, layout.dtype) for part in layout.parts(outcome.flat))
    if graph is not None:
        implicit = _Implicit(prepared, system, graph)
        parts = _Solution.apply(implicit, parts, *prepared.parts, *prepared.parameters)  # type: ignore[no-untyped-call]
    return SteadyState(
        layout.as_state(parts),
        outcome.reason,
        outcome.iterations,
        outcome.linear_iterations,
        bound.evaluations,
        outcome.residual,
    )


@dataclass
class _Implicit:
    """The equations at a steady state, with the graph of f there. `reversed`: a backward pass was taken."""

    prepared: _Prepared
    system: SteadySystem
    graph: StageGraph
    reversed: bool = False

    def gradient(self, cotangents: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """Return the gradient of <u, cotangents> with respect to the parameters. Collective.

        With R(u, theta) = 0 it is -(dR/dtheta)^T w, where (dR/du)^T w are the cotangents.
        """
        prepared, system = self.prepared, self.system
        layout, phase = prepared.layout, system.phase
        if prepared.agreed is not None:
            prepared.agreed.begin_backward(self.reversed)
        self.reversed = True
        destroy_left(system.comm)
        given = [
            torch.zeros(size, dtype=layout.state_dtype) if part is None else layout.scalar(part).reshape(-1)
            for part, size in zip(cotangents, layout.sizes, strict=True)
        ]
        with prepared.bound.copies.in_place():
            weights = transposed_solve(system, prepared.settings, self.graph, torch.cat(given))
            if phase is not None:
                weights = phase.projected(weights)
            products = system.point(self.graph).parameter_products(weights, 0.0)
        return [
            None if product is None else product.to(parameter)
            for product, parameter in zip(products, prepared.parameters, strict=True)
        ]


class _Solution(torch.autograd.Function):
    """A steady state as a node of the graph. Its inputs are the initial state, without a gradient, and parameters."""

    @staticmethod
    def forward(ctx: Any, implicit: _Implicit, parts: Parts, *tensors: torch.Tensor) -> Parts:
        """Return the parts of the state."""
        ctx.implicit = implicit
        ctx.set_materialize_grads(False)
        # Saving them lets torch detect changes in place.
        ctx.save_for_backward(*tensors[len(parts) :])
        return parts

    @staticmethod
    @outside_graphs
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        """Return the gradient with respect to the parameters."""
        implicit, parameters = ctx.implicit, ctx.saved_tensors
        with solve_lock(), torch.no_grad():
            products = implicit.gradient(cotangents)
        if torch.is_grad_enabled():
            given = (*(part for part in cotangents if part is not None), *parameters)
            products = [
                None if product is None else _FirstDerivative.apply(product, *given)  # type: ignore[no-untyped-call]
                for product in products
            ]
        return None, None, *(None,) * len(cotangents), *products


class _FirstDerivative(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Raise `ConfigurationError`."""
        raise ConfigurationError(
            "steady_state: second derivatives are not available: differentiate the gradient by differences"
        )
