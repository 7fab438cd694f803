"""Detection of torch's transforms: derivatives and batches beyond the ordinary graph.

`torch.func` wraps tensors, once for each active transform. Forward mode attaches tangents to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from pnode_dist.errors import ConfigurationError
from pnode_dist.system import torch_internals as internals

Results = tuple[torch.Tensor | None, ...]


def batching_or_tracking() -> bool:
    """Return True if a transform of `torch.func`, such as `grad`, `jvp` or `vmap`, is active."""
    return bool(internals.under_functorch())


def forward_mode() -> bool:
    """Return True if tensors may have tangents."""
    return internals.forward_mode_level() >= 0


def transforming() -> bool:
    """Return True if derivatives may be computed in another way than by an ordinary backward pass."""
    return batching_or_tracking() or forward_mode()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return True if a transform of `torch.func` has wrapped `tensor`."""
    return bool(internals.is_functorch_wrapper(tensor))


def is_batched(tensor: torch.Tensor) -> bool:
    """Return True if `tensor` is a batch, under any number of transforms."""
    while is_wrapped(tensor):
        if internals.is_functorch_batch(tensor):
            return True
        tensor = internals.unwrapped(tensor)
    return False


def has_tangent(tensor: torch.Tensor) -> bool:
    """Return True if `tensor` has a tangent at the innermost level of forward mode."""
    if not forward_mode() or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return _unpacked(tensor).tangent is not None


def is_followed(tensor: torch.Tensor) -> bool:
    """Return True if `tensor` is differentiated or batched in any way."""
    return tensor.requires_grad or is_wrapped(tensor) or has_tangent(tensor)


def is_followed_at_any_level(tensor: torch.Tensor) -> bool:
    """Return True if a result depends on a tensor that any transform differentiates or batches.

    A wrapper alone is not enough: a transform also wraps results that do not depend on its inputs.
    """
    if tensor.requires_grad or has_tangent(tensor) or internals.is_functorch_batch(tensor):
        return True
    if not is_wrapped(tensor):
        return False
    interpreter = internals.current_interpreter()
    inner = tensor
    if internals.wrapper_level(tensor) == interpreter.level():
        inner = internals.unwrapped(tensor)
    with interpreter.lower():
        return is_followed_at_any_level(inner)


def requires_gradient(tensor: torch.Tensor) -> bool:
    """Return True if a backward pass, also that of an outer transform, may differentiate with respect to `tensor`."""
    while not tensor.requires_grad:
        if not is_wrapped(tensor):
            return False
        tensor = internals.unwrapped(tensor)
    return True


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """Return the value of `tensor` without wrappers, tangents and graph. It must not be batched."""
    while is_wrapped(tensor):
        tensor = internals.unwrapped(tensor)
    return _unpacked(tensor).primal.detach() if has_tangent(tensor) else tensor.detach()


def _unpacked(tensor: torch.Tensor) -> forward_ad.UnpackedDualTensor:
    found: forward_ad.UnpackedDualTensor = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return found


def check_not_traced() -> None:
    """Raise `ConfigurationError` while torch traces operations: a solve is not one of them."""
    tracer: str | None = None
    if internals.is_dispatch_tracing():
        tracer = "torch.func.linearize, make_fx or torch.export"
    elif torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        tracer = "torch.jit.trace"
    elif batching_or_tracking() and internals.is_functionalizing():
        tracer = "torch.func.functionalize"
    if tracer is not None:
        raise ConfigurationError(
            f"{tracer}: a solve cannot be recorded as operations of torch: take derivatives by torch.func.jvp, vjp, "
            "grad, hessian or NeuralODE.jvp, or record f alone"
        )


def older_batching() -> bool:
    """Return True if there may be batches of the kind that `for_each_of_older_batch` describes."""
    return internals.legacy_batch_level() > 0


@contextmanager
def hooks_on_saved_tensors() -> Iterator[None]:
    """Allow hooks on saved tensors within a solve, which transforms do not trace. `torch.func` forbids them."""
    reason = internals.saved_tensor_hooks_refusal()
    if reason is None:
        yield
        return
    internals.allow_saved_tensor_hooks()
    try:
        yield
    finally:
        internals.refuse_saved_tensor_hooks(reason)


def for_each_of_older_batch(
    function: Callable[[Results], Results], tensors: Sequence[torch.Tensor | None]
) -> Results | None:
    """Apply `function` to each member of a batch. Returns a batch; None if none of `tensors` is one.

    These are the batches of `torch.autograd.grad` with `is_grads_batched` and of `torch.autograd.functional` with
    `vectorize`. They differ from those of `torch.func.vmap`, and torch calls no vmap rule for them.
    """
    if not any(tensor is not None and internals.is_legacy_batch(tensor) for tensor in tensors):
        return None
    level = internals.legacy_batch_level()
    batches = [
        internals.remove_batch_axis(tensor, level, 0, 0)
        if tensor is not None and internals.is_legacy_batch(tensor)
        else None
        for tensor in tensors
    ]
    (size,) = {len(batch) for batch in batches if batch is not None}
    found = [
        function(
            tuple(tensor if batch is None else batch[number] for tensor, batch in zip(tensors, batches, strict=True))
        )
        for number in range(size)
    ]
    return tuple(
        None if members[0] is None else internals.add_batch_axis(torch.stack(members), 0, level)
        for members in zip(*found, strict=True)
    )
