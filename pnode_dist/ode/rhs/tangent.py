"""Tangents of a solve: the derivatives of its states along a direction in initial state and parameters.

The tangent of a Runge-Kutta or theta step is the same step of the linearised equation
dv/dt = (df/du) v + (df/dtheta) dtheta. State and tangent are therefore solved as one state. The result is the exact
derivative of the numbers computed. It is differentiable: its gradient is a Hessian-vector product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.between import Mapped
from pnode_dist.ode.rhs.compute_dtype import ComputeCopies
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import layout_of
from pnode_dist.ode.rhs.observed import Costed, Observed
from pnode_dist.ode.rhs.parameters import Parameters, completeness_check
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.system.torch_internals import hooks_of, set_hooks

Parts = tuple[torch.Tensor, ...]


class WithTangent:
    """f and its derivative along a direction, as a right-hand side of the state (u, v).

    `every` are all parameters of f, and `direction` maps some of them to tangents. The result is differentiated with
    respect to `every`, the tangents and the state. f is checked for other parameters, see `completeness_check`.
    """

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(
        self,
        func: Function,
        is_tuple: bool,
        direction: Mapping[torch.Tensor, torch.Tensor],
        every: Parameters,
    ) -> None:
        self.func, self.is_tuple, self.every = func, is_tuple, every
        self.parameters = tuple(direction)
        self.tangents = tuple(direction.values())

    def __call__(self, t: torch.Tensor, state: Parts, *args: Any) -> Parts:
        """Return f(t, u) and (df/du) v + (df/dtheta) dtheta, part by part. Collective if f's backward is."""
        half = len(state) // 2
        if not torch.is_grad_enabled():
            evaluation = _Evaluation(self, t, state[:half], args)
            return (*(part.detach() for part in evaluation.outputs), *evaluation.along(state[half:], self.tangents))
        times = (t,) if t.requires_grad else ()
        inputs = (*times, *state, *self.every.tensors, *self.tangents)
        found: Parts = _Tangents.apply(self, t, half, args, *inputs)  # type: ignore[no-untyped-call]
        return found


class _Evaluation:
    """f at one state, with its graph, and products with its derivatives.

    The state is a leaf of the graph: derivatives with respect to parameters go through f alone.
    """

    def __init__(self, owner: WithTangent, t: torch.Tensor, state: Parts, args: tuple[Any, ...]) -> None:
        self.owner = owner
        self.parameters = owner.parameters
        with torch.enable_grad():
            # The state needs a gradient here, also if the caller does not differentiate it.
            self.inputs = tuple(part if _is_leaf(part) else part.detach().requires_grad_() for part in state)
            self.times = ((t if _is_leaf(t) else t.detach().requires_grad_()),) if t.requires_grad else ()
            values = owner.func(self.times[0] if self.times else t, self._state(), *args)
        self.outputs: Parts = tuple(values) if owner.is_tuple else (values,)
        completeness_check(owner.every)(self.outputs, (*self.inputs, *self.times))
        self.reached = [number for number, out in enumerate(self.outputs) if out.requires_grad]

    def _state(self) -> Any:
        return self.inputs if self.owner.is_tuple else self.inputs[0]

    def pulled(self, cotangents: Parts) -> Parts:
        """Return J^T w with respect to the state and the parameters with tangents, with its graph."""
        return torch.autograd.grad(
            [self.outputs[number] for number in self.reached],
            (*self.inputs, *self.parameters),
            [cotangents[number] for number in self.reached],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    def along(self, tangents: Parts, of_parameters: Parts) -> Parts:
        """Return J v, outside of any graph."""
        rates = [torch.zeros_like(out) for out in self.outputs]
        if not self.reached:
            return tuple(rates)
        # Disable hooks on parameters, which are for the gradient of the whole solve.
        with torch.enable_grad(), hooks_aside(self.owner.every.tensors):
            # J^T w is linear in w, so its derivative along a vector v is J v.
            probes = tuple(torch.zeros_like(out, requires_grad=True) for out in self.outputs)
            linear = self._linear(self.pulled(probes), (*tangents, *of_parameters))
            if linear:
                pushed = torch.autograd.grad(
                    [value for value, _ in linear],
                    [probes[number] for number in self.reached],
                    [tangent for _, tangent in linear],
                    allow_unused=True,
                    materialize_grads=True,
                    retain_graph=True,
                )
                for number, rate in zip(self.reached, pushed, strict=True):
                    rates[number] = rate
        return tuple(rate.detach() for rate in rates)

    def reverse(
        self, cotangents: Parts, tangents: Parts, of_parameters: Parts, differentiable: bool
    ) -> tuple[Sequence[torch.Tensor | None], Parts]:
        """Differentiate <f, w> + <J v, z> with respect to times, state and all parameters. Returns J^T z too.

        (w, z) are the cotangents. <J v, z> is differentiated as <v, J^T z>, which needs only second derivatives of f.
        Differentiating `along` would need third derivatives, which torch computes wrongly for some operations, batch
        and layer norms among them.
        """
        half = len(self.outputs)
        wanted = (*self.times, *self.inputs, *self.owner.every.tensors)
        if not self.reached:
            none = tuple(torch.zeros_like(part) for part in (*tangents, *of_parameters))
            return (None,) * len(wanted), none
        with torch.enable_grad(), hooks_aside(self.owner.every.tensors):
            pulled = self.pulled(cotangents[half:])
            linear = self._linear(pulled, (*tangents, *of_parameters))
            found = torch.autograd.grad(
                [*(self.outputs[number] for number in self.reached), *(value for value, _ in linear)],
                wanted,
                [*(cotangents[number] for number in self.reached), *(tangent for _, tangent in linear)],
                create_graph=differentiable,
                allow_unused=True,
                retain_graph=True,
            )
        if not differentiable:
            pulled = tuple(part.detach() for part in pulled)
        return found, pulled

    @staticmethod
    def _linear(pulled: Parts, tangents: Parts) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(pulled, tangents, strict=True)
        return [(value, tangent.to(value.dtype)) for value, tangent in pairs if value.requires_grad]


class _Tangents(torch.autograd.Function):
    """f and its derivative along a direction as one node of the graph, see `_Evaluation.reverse`."""

    @staticmethod
    def forward(ctx: Any, owner: WithTangent, t: torch.Tensor, half: int, args: Any, *inputs: torch.Tensor) -> Parts:
        """Return the values. Inputs: the time if it is differentiated, state, tangents, parameters, their tangents."""
        ctx.times = int(t.requires_grad)
        ctx.half = half
        state = inputs[ctx.times : ctx.times + half]
        ctx.evaluation = evaluation = _Evaluation(owner, t, state, args)
        tangents = inputs[ctx.times + half : ctx.times + 2 * half]
        ctx.save_for_backward(*tangents, *owner.tangents)
        return (*(part.detach() for part in evaluation.outputs), *evaluation.along(tangents, owner.tangents))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        """Return the derivatives with respect to the inputs."""
        half, evaluation = ctx.half, ctx.evaluation
        tangents, of_parameters = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        found, pulled = evaluation.reverse(cotangents, tangents, of_parameters, torch.is_grad_enabled())
        before, own = found[: ctx.times + half], found[ctx.times + half :]
        by_tangents = [part.to(like.dtype) for part, like in zip(pulled, (*tangents, *of_parameters), strict=True)]
        return None, None, None, None, *before, *by_tangents[:half], *own, *by_tangents[half:]


def _is_leaf(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.grad_fn is None


def in_compute_type(func: Function, copies: ComputeCopies) -> Function:
    """Return `func` with the tangents of parameters, if it has any, assigned to the parameters' copies."""
    if isinstance(func, Observed):
        return Observed(in_compute_type(func.func, copies), in_compute_type(func.observe, copies))
    if isinstance(func, Mapped):
        return Mapped(in_compute_type(func.func, copies), in_compute_type(func.between, copies))
    if isinstance(func, SplitFunction) and isinstance(func.explicit, WithTangent):
        return SplitFunction(
            implicit=in_compute_type(func.implicit, copies), explicit=in_compute_type(func.explicit, copies)
        )
    if not isinstance(func, WithTangent):
        return func
    direction = dict(zip(copies.of(func.parameters), func.tangents, strict=True))
    every = replace(func.every, tensors=copies.of(func.every.tensors))
    return WithTangent(in_compute_type(func.func, copies), func.is_tuple, direction, every)


def with_tangent(
    func: Function, is_tuple: bool, direction: Mapping[torch.Tensor, torch.Tensor], every: Parameters
) -> Function:
    """Return the right-hand side of a state and its tangent, split like `func`. `every`: all parameters of `func`.

    Its observation, if it has one, is followed by its own tangent, and so is the map between its steps.
    """
    if isinstance(func, Costed):
        raise ConfigurationError(
            "integrate: its integrals by an implicit method have no second derivatives and no tangents: choose an "
            "explicit method"
        )
    if isinstance(func, Observed):
        return Observed(
            with_tangent(func.func, is_tuple, direction, every), WithTangent(func.observe, True, direction, every)
        )
    if isinstance(func, Mapped):
        return Mapped(
            with_tangent(func.func, is_tuple, direction, every), WithTangent(func.between, True, direction, every)
        )
    if isinstance(func, SplitFunction):
        return SplitFunction(
            implicit=WithTangent(func.implicit, is_tuple, direction, every),
            explicit=WithTangent(func.explicit, is_tuple, direction, every),
        )
    return WithTangent(func, is_tuple, direction, every)


def without_tangents(func: Function, levels: int) -> Function:
    """Return the right-hand side before `levels` of tangents were added."""
    if isinstance(func, Observed):
        return Observed(without_tangents(func.func, levels), without_tangents(func.observe, levels))
    if isinstance(func, Mapped):
        return Mapped(without_tangents(func.func, levels), without_tangents(func.between, levels))
    for _ in range(levels):
        if isinstance(func, SplitFunction):
            parts = func.implicit, func.explicit
            implicit, explicit = (part.func if isinstance(part, WithTangent) else part for part in parts)
            func = SplitFunction(implicit=implicit, explicit=explicit)
        elif isinstance(func, WithTangent):
            func = func.func
    return func


def checked_direction(
    direction: Mapping[torch.Tensor, torch.Tensor] | None,
) -> Mapping[torch.Tensor, torch.Tensor]:
    """Check the tangents of parameters, and return them. Raises `ConfigurationError` for a wrong shape."""
    for parameter, tangent in (direction or {}).items():
        if tangent.shape != parameter.shape or not parameter.requires_grad:
            raise ConfigurationError(
                f"parameter_tangents: shape {tuple(tangent.shape)} for a parameter of shape {tuple(parameter.shape)}: "
                "must be the same, and the parameter must require a gradient"
            )
    return direction or {}


def stacked(u0: Any, tangent: Any) -> tuple[Parts, bool]:
    """Return state and tangent as one tuple of parts, and True for a tuple state. Raises `ConfigurationError`."""
    layout, parts = layout_of(u0)
    of_tangent, tangents = layout_of(tangent)
    if of_tangent.shapes != layout.shapes:
        raise ConfigurationError(f"u0_tangent: shapes {of_tangent.shapes} for a state of {layout.shapes}")
    return (*parts, *(part.to(layout.device, layout.dtype) for part in tangents)), layout.is_tuple


@contextmanager
def hooks_aside(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Disable hooks on tensors: they are for the gradient of the whole solve, not for that of each stage."""
    hooked = [(tensor, hooks) for tensor in tensors if (hooks := hooks_of(tensor))]
    for tensor, _ in hooked:
        set_hooks(tensor, None)
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            set_hooks(tensor, hooks)
