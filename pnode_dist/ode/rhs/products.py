"""Products of vectors with the derivatives of the right-hand side: vjp and jvp of a recorded evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from pnode_dist.ode.rhs.evaluation import BoundFunction, StageGraph
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.parameters import HOW_TO_NAME_IT
from pnode_dist.petsc import log
from pnode_dist.system.torch_internals import gradients


class Cotangents(NamedTuple):
    """The vjp of one evaluation of f with a vector v: one product for each part of the state and each parameter.

    None is zero. For the gradient with respect to times, `value` is <f, v> and `time` is <df/dt, v>.
    """

    states: Sequence[torch.Tensor | None]
    parameters: Sequence[torch.Tensor | None]
    value: torch.Tensor | int | None
    time: torch.Tensor | None


def vjp(
    bound: BoundFunction,
    graph: StageGraph,
    cotangents: Sequence[torch.Tensor | None],
    *,
    states: bool = True,
    parameters: bool = True,
    keep: bool = False,
) -> Cotangents:
    """Multiply the cotangents of f's value by its derivatives. Collective if the backward pass of f is.

    A cotangent None is zero. `states` and `parameters` select the products. `keep` keeps the graph for another use.
    Raises `ValueError` if the graph leads to a result that was computed, and differentiated, before the solve.
    """
    roots, along = [], []
    for root, start, part in zip(graph.roots, graph.inputs, cotangents, strict=True):
        if root is not None and part is not None:
            roots.append(root)
            along.append(part if part.dtype is start.dtype and start.is_cpu else part.to(start))
    value = None
    if parameters and bound.needs_time_gradient:
        value = sum(
            (out.detach().to(part) * part).sum(dtype=torch.float64)
            for out, part in zip(graph.values, cotangents, strict=True)
            if part is not None
        )
    times = () if graph.time is None or not parameters else (graph.time,)
    if not roots:
        # No part of f's value depends on an input: every derivative is zero.
        none = (None,) * len(bound.parameters.tensors)
        return Cotangents((None,) * len(graph.inputs) if states else (), none if parameters else (), value, None)
    bound.vjps += 1
    wanted = (*(graph.inputs if states else ()), *(bound.parameters.tensors if parameters else ()), *times)
    if not wanted:
        return Cotangents((), (), value, None)
    found = pull_back(bound, roots, wanted, along, keep)
    split = len(graph.inputs) if states else 0
    last = len(found) - len(times)
    return Cotangents(found[:split], found[split:last], value, found[last] if times else None)


def pull_back(
    bound: BoundFunction,
    roots: Sequence[GradientEdge],
    wanted: Sequence[torch.Tensor | GradientEdge],
    along: Sequence[torch.Tensor],
    keep: bool = False,
    sums: Sequence[torch.Tensor | None] = (),
) -> Sequence[torch.Tensor | None]:
    """Differentiate <roots, along> with respect to `wanted`. Collective if the backward pass of f is.

    `keep` keeps the graph for another use. Derivatives with respect to parameters are added to their `sums`, if given,
    one contribution after the other: the result does not depend on the number of evaluations in one graph. Raises
    `ValueError` if the graph leads to a result that was computed, and differentiated, before the solve.
    """
    begun = [
        (parameter, begin)
        for parameter, begin in zip(bound.parameters.tensors, sums, strict=False)
        if begin is not None
    ]
    bound.in_backward = True
    try:
        with log.event(log.PRODUCT, bound.logs):
            return gradients(
                (*roots, *(parameter for parameter, _ in begun)),
                wanted,
                (*along, *(begin for _, begin in begun)),
                keep or bound.parameters.shares_graph,
            )
    except RuntimeError as error:
        if "through the graph a second time" not in str(error):
            raise
        raise ValueError(
            "func depends on an intermediate result that was computed before the solve and was not found among its "
            f"parameters: {HOW_TO_NAME_IT}"
        ) from None
    finally:
        bound.in_backward = False


def batched_vjp(bound: BoundFunction, graph: StageGraph, layout: StateLayout, flats: torch.Tensor) -> torch.Tensor:
    """Multiply each row of `flats` by f's derivative with respect to the state, all at once.

    For an f without communication. Raises `RuntimeError` if an operation has no rule for batches.
    """
    pieces = [
        piece.reshape(-1, *shape).to(layout.device, layout.compute_dtype)
        for piece, shape in zip(torch.split(flats, list(layout.sizes), dim=1), layout.shapes, strict=True)
    ]
    pairs = [(out, piece) for out, piece in zip(graph.values, pieces, strict=True) if out.requires_grad]
    if not pairs:
        return torch.zeros_like(flats)
    outputs, along = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs,
        graph.inputs,
        along,
        allow_unused=True,
        retain_graph=True,
        is_grads_batched=True,
    )
    bound.vjps += len(flats)
    # A zero that torch materialises has no axis for the batch.
    rows = [
        flats.new_zeros(len(flats), size) if value is None else value.reshape(len(flats), size)
        for value, size in zip(found, layout.sizes, strict=True)
    ]
    return torch.cat([row.to(flats) for row in rows], dim=1)


def tangent_map(bound: BoundFunction, graph: StageGraph) -> TangentMap:
    """Return the jvp of f with respect to the state as a function. Collective if the backward pass of f is.

    The vjp J^T w is linear in w, so its derivative with respect to w along v is J v. The graph of the vjp is kept: each
    product then costs one backward pass. (Forward mode evaluates f anew for each product, and torch's takes a slow path
    through Python for operands without a tangent.)
    """
    numbers = [number for number, out in enumerate(graph.values) if out.requires_grad]
    probes = tuple(torch.zeros_like(graph.values[number], requires_grad=True) for number in numbers)
    if not numbers:
        return TangentMap(bound, graph.values, (), (), ())
    with torch.enable_grad():
        pulled = torch.autograd.grad(
            [graph.values[number] for number in numbers],
            graph.inputs,
            probes,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return TangentMap(bound, graph.values, tuple(numbers), probes, pulled)


@dataclass(slots=True)
class TangentMap:
    """J v at one state for any v, see `tangent_map`. `pulled` is J^T `probes`, with its graph."""

    bound: BoundFunction
    outputs: Parts
    numbers: tuple[int, ...]
    probes: Parts
    pulled: Parts

    def __call__(self, tangents: Parts) -> Parts:
        """Return J v, part by part."""
        self.bound.jvps += 1
        results = [torch.zeros_like(out) for out in self.outputs]
        if not self.numbers:
            return tuple(results)  # f depends on no part of the state.
        pairs = [
            (value, tangent.to(value))
            for value, tangent in zip(self.pulled, tangents, strict=True)
            if value.requires_grad
        ]
        if pairs:
            values, along = zip(*pairs, strict=True)
            pushed = torch.autograd.grad(
                values, self.probes, along, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            for number, value in zip(self.numbers, pushed, strict=True):
                results[number] = value
        return tuple(results)


def added(
    sums: Sequence[torch.Tensor | None], products: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """Return sums over parameters with one more product each, in `dtype` or a wider type; None is zero."""
    found: list[torch.Tensor | None] = []
    for old, product in zip(sums, products, strict=True):
        if product is None:
            found.append(old)
            continue
        product = product.to(torch.promote_types(product.dtype, dtype))
        found.append(product if old is None else old + product)
    return found


def step_cotangents(found: Cotangents, offset: float) -> list[torch.Tensor | None]:
    """Return the cotangents of a step's size and start for one stage, `offset` later than the start of the step.

    They are treated as two more parameters of f. A step of size h from t_n with alpha f(t_n + alpha (t - t_n) + beta,
    u) for f is a step of size alpha h from t_n + beta. So the derivative with respect to alpha = 1 is h times the one
    with respect to h, and the derivative with respect to beta = 0 is the one with respect to t_n. Every method that has
    an adjoint with respect to parameters therefore has one with respect to time.
    """
    stretch = found.value if isinstance(found.value, torch.Tensor) else None
    if found.time is None:
        return [stretch, None]
    shift = found.time.double()
    return [shift * offset if stretch is None else stretch + shift * offset, shift]
