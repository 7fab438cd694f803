"""Whether torch differentiates or batches what is computed now, beyond its ordinary graph.

`torch.func` wraps tensors, one wrapper for each transform that is under way; forward mode attaches tangents to them.
Both are looked up by `pnode_dist.system.torch_internals`.
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
    """Whether a transform of `torch.func`, such as `grad`, `jvp` or `vmap`, is under way."""
    return bool(internals.under_functorch())


def forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return internals.forward_mode_level() >= 0


def transforming() -> bool:
    """Whether derivatives may be asked for in another way than by an ordinary backward pass."""
    return batching_or_tracking() or forward_mode()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of `torch.func` has wrapped `tensor`."""
    return bool(internals.is_functorch_wrapper(tensor))


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether `tensor` stands for a batch of others, under any number of transforms."""
    while is_wrapped(tensor):
        if internals.is_functorch_batch(tensor):
            return True
        tensor = internals.unwrapped(tensor)
    return False


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has a tangent of the innermost level of forward mode."""
    if not forward_mode() or not tensor.is_floating_point():
        return False
    return _unpacked(tensor).tangent is not None


def is_followed(tensor: torch.Tensor) -> bool:
    """Whether what is computed from `tensor` is differentiated or batched, in any way."""
    return tensor.requires_grad or is_wrapped(tensor) or has_tangent(tensor)


def is_followed_at_any_level(tensor: torch.Tensor) -> bool:
    """Whether `tensor`, computed now, depends on anything that some transform differentiates or batches.

    A transform wraps what is computed under it, whether that depends on its inputs or not.
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
    """Whether some backward pass may ask for a gradient with respect to `tensor`, that of an outer transform too."""
    while not tensor.requires_grad:
        if not is_wrapped(tensor):
            return False
        tensor = internals.unwrapped(tensor)
    return True


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The value of `tensor` without wrappers and tangents, outside of any graph. It must not be batched."""
    while is_wrapped(tensor):
        tensor = internals.unwrapped(tensor)
    return _unpacked(tensor).primal.detach() if has_tangent(tensor) else tensor.detach()


def _unpacked(tensor: torch.Tensor) -> forward_ad.UnpackedDualTensor:
    found: forward_ad.UnpackedDualTensor = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return found


def check_not_traced() -> None:
    """Raise `ConfigurationError` while torch records operations, of which a solve is none, to run them again."""
    tracer: str | None = None
    if internals.is_dispatch_tracing():
        tracer = "torch.func.linearize, make_fx or torch.export"
    elif internals.is_jit_tracing():
        tracer = "torch.jit.trace"
    elif batching_or_tracking() and internals.is_functionalizing():
        tracer = "torch.func.functionalize"
    if tracer is not None:
        raise ConfigurationError(
            f"{tracer}: a solve cannot be recorded as operations of torch: take derivatives by torch.func.jvp, vjp, "
            "grad, hessian or NeuralODE.jvp, or record f alone"
        )


def older_batching() -> bool:
    """Whether batches of the kind that `for_each_of_older_batch` describes may occur."""
    return internals.legacy_batch_level() > 0


@contextmanager
def hooks_on_saved_tensors() -> Iterator[None]:
    """Allow them within a solve, which no transform sees into: under those of `torch.func` they are forbidden."""
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
    """The results of `function` for each member of a batch, as a batch; None if none of `tensors` is one.

    Meant are the batches of `torch.autograd.grad` with `is_grads_batched` and of `torch.autograd.functional` with
    `vectorize`, which are not those of `torch.func.vmap`, and which no rule of a node of the graph is asked about.
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
