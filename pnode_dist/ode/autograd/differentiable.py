"""A solve and its gradient as nodes of torch's graph, which can be differentiated again and under transforms.

`Solution` and `TransformedSolution` are the states of a `Call`. The second has the form that the transforms of
`torch.func` require, and is slower. `Gradient` is the gradient of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.autograd.call import Call, Products
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.autograd.saved_trajectory import held_by, hidden_from_checkpoint, ticket_of
from pnode_dist.ode.autograd.transforms import (
    batching_or_tracking,
    for_each_of_older_batch,
    forward_mode,
    older_batching,
    requires_gradient,
    transforming,
)
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.layout import Parts

Tensors = tuple[torch.Tensor, ...]


def solution(call: Call, tensors: Tensors) -> Parts:
    """Return the states of `call` at `tensors`, as nodes of the graph. Collective on the partition's communicator."""
    node = TransformedSolution if batching_or_tracking() else Solution
    found: Parts = node.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return found


class _Solution(torch.autograd.Function):
    """The derivatives of both forms."""

    @staticmethod
    @outside_graphs
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        """Return the gradient: as a node of the graph if it may be differentiated, else as plain tensors."""
        call, tensors = ctx.call, _saved(ctx)
        if torch.is_grad_enabled() or transforming() or older_batching() or call.last is None:
            return None, *_each(call, lambda given: gradient(call, given, tensors), cotangents)
        return None, *call.reverse(cotangents, tensors, same=True)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Return the tangents of the states along those of the inputs."""
        call, tensors = ctx.call, ctx.saved_tensors
        return _each(call, lambda along: _pushed(call, tensors, along), tangents[1:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *tensors: torch.Tensor) -> Any:
        """Return the states of each member of the batch: in one solve if that is exact, else one after the other."""
        _refuse_ranks(call)
        if call.asked.folds and _is_batch_of_states(call, in_dims[1:], tensors):
            # An operation of f may have no rule for batches.
            with suppress(Exception):
                return _folded(info.batch_size, in_dims[1:], call, tensors)
        call.members = [call.again() for _ in range(info.batch_size)]
        found = [solution(member, _member(tensors, in_dims[1:], number)) for number, member in enumerate(call.members)]
        _refuse_draws(info, call.members)
        outputs = tuple(map(torch.stack, zip(*found, strict=True)))
        return outputs, (0,) * len(outputs)


class Solution(_Solution):
    """The states of a call as nodes of torch's graph: inputs are the call and its tensors."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: torch.Tensor) -> Parts:
        """Run the solve. Its trajectory lives as long as the saved tensors."""
        with hidden_from_checkpoint() as hidden:
            outputs = call.run(tensors)
        run = call.last
        assert run is not None
        if hidden:
            run.solve.outcome = fingerprint(outputs)
        _remember(ctx, call, (*tensors, ticket_of(run, run.solve.abandon)))
        ctx.has_ticket = True
        if forward_mode():
            ctx.save_for_forward(*tensors)
        return outputs


class TransformedSolution(_Solution):
    """The states of a call in the form that `torch.func` requires."""

    @staticmethod
    def forward(call: Call, *tensors: torch.Tensor) -> Parts:
        """Run the solve."""
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Hold what derivatives need."""
        call, *tensors = inputs
        _remember(ctx, call, tensors)
        ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> Tensors:
    """Return the saved tensors of the call, and set its last run to that of the saved trajectory."""
    saved: Tensors = ctx.saved_tensors
    if not ctx.has_ticket:
        return saved
    call, run = ctx.call, held_by(saved[-1])
    if run is not None and run is not call.last:
        # torch.utils.checkpoint has recomputed the forward pass, with a trajectory of its own.
        run.solve.compare_outcome(call.last.solve.outcome)
        call.last = run
    return saved[:-1]


def _remember(ctx: Any, call: Call, tensors: Sequence[torch.Tensor]) -> None:
    ctx.call, ctx.has_ticket = call, False
    ctx.set_materialize_grads(False)
    # Saving them lets torch detect changes in place, also before the first backward pass.
    ctx.save_for_backward(*tensors)


def gradient(call: Call, cotangents: Sequence[torch.Tensor | None], tensors: Tensors) -> Products:
    """Return the gradient of <states, cotangents> with respect to `tensors`, as a node of the graph. Collective."""
    found: Products = Gradient.apply(call, len(cotangents), *cotangents, *tensors)  # type: ignore[no-untyped-call]
    return found


class Gradient(torch.autograd.Function):
    """The gradient of a call. Inputs: the call, the number of cotangents, the cotangents, and the call's tensors."""

    @staticmethod
    def forward(call: Call, outputs: int, *tensors: torch.Tensor | None) -> Products:
        """Reverse the solve. Run it first if it has no trajectory."""
        cotangents, own = tensors[:outputs], _given(tensors[outputs:])
        found = call.reverse(cotangents, own)
        taken = {tensor.untyped_storage().data_ptr() for tensor in _given(tensors)}
        return tuple(
            torch.zeros_like(tensor) if value is None else _of_its_own(value, taken)
            for value, tensor in zip(found, own, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Hold what derivatives need."""
        ctx.call, ctx.outputs, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *directions: torch.Tensor | None) -> Any:
        """Return J v for the cotangents, and the Hessian product H v for the tensors, with v the `directions`."""
        call, cotangents, own = _parts_of(ctx)
        wanted = any(ctx.needs_input_grad[2 + ctx.outputs :]) or call.asked.ranks > 1

        def products(along: Products) -> Products:
            tangent, inputs = tangent_call_of(call, own, along, True, torch.is_grad_enabled() or transforming())
            tangents = solution(tangent, inputs)[-len(cotangents) :]
            by_cotangents = [None if given is None else t for given, t in zip(cotangents, tangents, strict=True)]
            return *by_cotangents, *(_hessian_product(tangent, inputs, cotangents) if wanted else (None,) * len(own))

        return None, None, *_each(call, products, directions)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Return the tangent of J^T w along those of w and of the tensors: J^T dw + H v."""
        call, cotangents, own = _parts_of(ctx)
        every, outputs = call.asked.ranks > 1, ctx.outputs

        def products(given: Products) -> Products:
            found: Products = tuple(map(torch.zeros_like, own))
            if every or _given(given[:outputs]):
                found = _sum(found, gradient(call, given[:outputs], own))
            if every or _given(given[outputs:]):
                tangent, inputs = tangent_call_of(call, own, given[outputs:], True, True)
                found = _sum(found, _hessian_product(tangent, inputs, cotangents))
            return found

        return _each(call, products, tangents[2:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, outputs: int, *tensors: torch.Tensor | None) -> Any:
        """Return the gradient of each member of the batch."""
        _refuse_ranks(call)
        dims = in_dims[2:]
        members = [call] * info.batch_size
        if any(dim is not None for dim in dims[outputs:]):
            members = call.members
            if len(members) != info.batch_size:
                members = [call.again() for _ in range(info.batch_size)]
        found = []
        for number, member in enumerate(members):
            of_member = _member(tensors, dims, number)
            found.append(gradient(member, of_member[:outputs], _given(of_member[outputs:])))
        results = tuple(map(torch.stack, zip(*found, strict=True)))
        return results, (0,) * len(results)


def _each(call: Call, function: Callable[[Products], Products], tensors: Products) -> Products:
    """Apply `function`, member by member for a batch that has no vmap rule."""
    batch = for_each_of_older_batch(function, tensors)
    if batch is None:
        return function(tensors)
    _refuse_ranks(call)
    return batch


def _pushed(call: Call, tensors: Tensors, along: Products) -> Products:
    """Return the tangents of the states of `call` along those of its tensors."""
    keeps = torch.is_grad_enabled() and any(map(requires_gradient, (*tensors, *_given(along))))
    tangent, inputs = tangent_call_of(call, tensors, along, keeps)
    found = solution(tangent, inputs)
    return found[len(found) // 2 :]


def _parts_of(ctx: Any) -> tuple[Call, Products, Tensors]:
    saved = ctx.saved_tensors
    return ctx.call, saved[: ctx.outputs], saved[ctx.outputs :]


def _hessian_product(tangent: Call, inputs: Tensors, cotangents: Products) -> Products:
    """Return H v with respect to the tensors of the call without tangents; v is the direction among `inputs`."""
    found = gradient(tangent, (*(None,) * len(cotangents), *cotangents), inputs)
    states, parameters, times = tangent.separated(found)
    return (*states[: tangent.parts // 2], *parameters[: tangent.parameters - len(tangent.directions[-1])], *times)


def tangent_call_of(
    call: Call,
    tensors: Tensors,
    along: Sequence[torch.Tensor | None],
    keeps: bool,
    by_directions: bool | None = None,
) -> tuple[Call, Tensors]:
    """Return the call of the tangents of `call` along directions of its tensors (None: zero), and its inputs."""
    states, parameters, times = call.separated(tensors)
    of_states, of_parameters, of_times = call.separated(along)
    if _given(of_times):
        raise ConfigurationError(
            "t: tangents with respect to the times, and derivatives of the gradient by the times, are not available: "
            "stretch time instead, du/ds = T f(T s, u) with the end T as a parameter of f"
        )
    # On several ranks f may communicate between a parameter and its value, so all of them take part.
    numbers = tuple(
        number
        for number, (parameter, direction) in enumerate(zip(parameters, of_parameters, strict=True))
        if (direction is not None or call.asked.ranks > 1) and (parameter.is_floating_point() or parameter.is_complex())
    )
    tangent = call.tangent(numbers, keeps, keeps if by_directions is None else by_directions)
    inputs = (
        *states,
        *(_or_zero(direction, state) for direction, state in zip(of_states, states, strict=True)),
        *parameters,
        *(_or_zero(of_parameters[number], parameters[number]) for number in numbers),
        *times,
    )
    return tangent, inputs


def _or_zero(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


def _given(tensors: Sequence[torch.Tensor | None]) -> Tensors:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _sum(first: Products, second: Products) -> Products:
    return tuple(a if b is None else b if a is None else a + b for a, b in zip(first, second, strict=True))


def _member(tensors: Sequence[Any], dims: Sequence[int | None], number: int) -> tuple[Any, ...]:
    return tuple(
        tensor if dim is None or tensor is None else tensor.select(dim, number)
        for tensor, dim in zip(tensors, dims, strict=True)
    )


def _of_its_own(value: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """Copy `value` if it shares memory with an input, which a node of the graph must not return."""
    return value.clone() if value.untyped_storage().data_ptr() in taken else value


def _is_batch_of_states(call: Call, dims: Sequence[int | None], tensors: Tensors) -> bool:
    """Return True if the members of a batch differ in their states alone, and no inner transform asks for gradients.

    Gradients with respect to parameters differ between members, and take a solve for each.
    """
    is_ours = not call.keeps or any(map(requires_gradient, tensors))
    return is_ours and all(dim is None for dim in dims[call.parts :])


def _folded(size: int, dims: Sequence[int | None], call: Call, tensors: Tensors) -> tuple[Parts, tuple[int, ...]]:
    states = (
        part.expand(size, *part.shape) if dim is None else part.movedim(dim, 0)
        for part, dim in zip(tensors[: call.parts], dims, strict=False)
    )
    whole = call.of_batch()
    outputs = solution(whole, (*(part.contiguous() for part in states), *tensors[call.parts :]))
    call.whole = whole
    return outputs, (0 if call.asked.only_last else 1,) * len(outputs)


def _refuse_draws(info: Any, members: Sequence[Call]) -> None:
    """Raise `ConfigurationError` if f draws random numbers, which would be the same for each member of a batch."""
    if info.randomness != "same" and any(member.drew for member in members):
        raise ConfigurationError(
            f"vmap: func draws random numbers, and randomness = {info.randomness!r}: must be 'same', or call the solve "
            "in a loop"
        )


def _refuse_ranks(call: Call) -> None:
    """Raise `ConfigurationError` for a batch of solves whose state is spread over several ranks."""
    if call.asked.ranks > 1:
        raise ConfigurationError(
            f"vmap: the state is spread over {call.asked.ranks} ranks, and each of them would have batches of its own: "
            "call the solve in a loop, the same on all ranks, or NeuralODE.jvp for one direction at a time"
        )
