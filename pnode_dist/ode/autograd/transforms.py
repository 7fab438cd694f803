"""Whether torch differentiates or batches what is computed now, beyond its ordinary graph.

`torch.func` wraps tensors, one wrapper for each transform that is under way; forward mode attaches tangents to them.
Both are looked up here alone, by functions of torch that are private.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from pnode_dist.errors import ConfigurationError

Results = tuple[torch.Tensor | None, ...]


def batching_or_tracking() -> bool:
    """Whether a transform of `torch.func`, such as `grad`, `jvp` or `vmap`, is under way."""
    return bool(torch._C._are_functorch_transforms_active())


def forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def transforming() -> bool:
    """Whether derivatives may be asked for in another way than by an ordinary backward pass."""
    return batching_or_tracking() or forward_mode()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a transform of `torch.func` has wrapped `tensor`."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether `tensor` stands for a batch of others, under any number of transforms."""
    while is_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
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
    if tensor.requires_grad or has_tangent(tensor) or torch._C._functorch.is_batchedtensor(tensor):
        return True
    if not is_wrapped(tensor):
        return False
    interpreter = retrieve_current_functorch_interpreter()
    inner = tensor
    if torch._C._functorch.maybe_get_level(tensor) == interpreter.level():
        inner = torch._C._functorch.get_unwrapped(tensor)
    with interpreter.lower():
        return is_followed_at_any_level(inner)


def requires_gradient(tensor: torch.Tensor) -> bool:
    """Whether some backward pass may ask for a gradient with respect to `tensor`, that of an outer transform too."""
    while not tensor.requires_grad:
        if not is_wrapped(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The value of `tensor` without wrappers and tangents, outside of any graph. It must not be batched."""
    while is_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return _unpacked(tensor).primal.detach() if has_tangent(tensor) else tensor.detach()


def _unpacked(tensor: torch.Tensor) -> forward_ad.UnpackedDualTensor:
    found: forward_ad.UnpackedDualTensor = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return found


def check_not_traced() -> None:
    """Raise `ConfigurationError` while torch records operations, of which a solve is none, to run them again."""
    key = torch._C._TorchDispatchModeKey
    tracer: str | None = None
    if torch._C._get_dispatch_mode(key.PROXY) is not None or torch._C._get_dispatch_mode(key.FAKE) is not None:
        tracer = "torch.func.linearize, make_fx or torch.export"
    elif torch._C._get_tracing_state() is not None:
        tracer = "torch.jit.trace"
    elif batching_or_tracking() and any(
        interpreter.key() == TransformType.Functionalize for interpreter in torch._C._functorch.get_interpreter_stack()
    ):
        tracer = "torch.func.functionalize"
    if tracer is not None:
        raise ConfigurationError(
            f"{tracer}: a solve cannot be recorded as operations of torch: take derivatives by torch.func.jvp, vjp, "
            "grad, hessian or NeuralODE.jvp, or record f alone"
        )


def older_batching() -> bool:
    """Whether batches of the kind that `for_each_of_older_batch` describes may occur."""
    return _older_level() > 0


def _older_level() -> int:
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


@contextmanager
def hooks_on_saved_tensors() -> Iterator[None]:
    """Allow them within a solve, which no transform sees into: under those of `torch.func` they are forbidden."""
    reason = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if reason is None:
        yield
        return
    torch._C._autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_disable(reason)


def for_each_of_older_batch(
    function: Callable[[Results], Results], tensors: Sequence[torch.Tensor | None]
) -> Results | None:
    """The results of `function` for each member of a batch, as a batch; None if none of `tensors` is one.

    Meant are the batches of `torch.autograd.grad` with `is_grads_batched` and of `torch.autograd.functional` with
    `vectorize`, which are not those of `torch.func.vmap`, and which no rule of a node of the graph is asked about.
    """
    if not any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors):
        return None
    level = _older_level()
    batches = [
        torch._remove_batch_dim(tensor, level, 0, 0)
        if tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)
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
        None if members[0] is None else torch._add_batch_dim(torch.stack(members), 0, level)
        for members in zip(*found, strict=True)
    )
