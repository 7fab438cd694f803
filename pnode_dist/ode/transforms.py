"""Whether torch differentiates or batches what is computed now, beyond its ordinary graph.

`torch.func` wraps tensors, one wrapper for each transform that is under way; forward mode attaches tangents to them.
Both are looked up here alone, by functions of torch that are private.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


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
