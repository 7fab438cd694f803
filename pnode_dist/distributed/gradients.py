"""Parameter gradients over the mesh: summed over state ranks, averaged over data replicas.

Every rank differentiates its own share of the loss, so a replica's gradient is the sum of its ranks' gradients, and
the gradient of the mean loss over replicas is that sum divided by their number. torch's DistributedDataParallel does
the bucketing and takes the mean over all ranks. What each rank contributes is therefore multiplied by the number of
state ranks first: unlike a sum in place of the mean, that leaves alone what earlier backward passes have accumulated.

The gradient of a sharded parameter (`pnode_dist.distributed.sharding`) is complete on the rank that holds it, and only
its mean over replicas is taken: by DistributedDataParallel over the replicas if all parameters are sharded, else beside
it.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.distributed.sharding import shards_of
from pnode_dist.system.torch_internals import at_end_of_backward, ignore_in_data_parallel, tree_map_only


class _Completion:
    """What DistributedDataParallel over all ranks leaves to be done in a backward pass through the wrapped module.

    Gradients are multiplied by `factor` as they come, and those of `sharded` parameters are averaged over the replicas
    at the end of the pass, if DistributedDataParallel synchronises its own in it.
    """

    def __init__(self, factor: int, sharded: list[nn.Parameter], mesh: Mesh) -> None:
        self._factor, self._sharded, self._mesh = factor, sharded, mesh
        self._coming_through = self._synchronises = False

    def begin(self) -> None:
        """Called when a backward pass reaches the module's output."""
        if not self._coming_through:
            self._coming_through = True
            at_end_of_backward(self.end)

    def end(self) -> None:
        """Called when that backward pass is over."""
        self._coming_through = False
        if self._synchronises:
            self._synchronises = False
            for value in self._sharded:
                # Never skipped, or replicas might wait for each other.
                if value.grad is None:
                    value.grad = torch.zeros_like(value)
                dist.all_reduce(value.grad, group=self._mesh.data_group)
                value.grad.div_(self._mesh.data_replicas)

    def scale(self, gradient: torch.Tensor) -> torch.Tensor:
        """The hook of every parameter that is not sharded."""
        return gradient * self._factor if self._coming_through else gradient

    def watch(self, module: DistributedDataParallel, inputs: Any, output: Any) -> Any:
        """The forward hook of the wrapper."""
        self._coming_through = False
        if torch.is_grad_enabled():
            self._synchronises = module.require_backward_grad_sync and self._mesh.data_replicas > 1
        return tree_map_only(torch.Tensor, lambda x: _Watched.apply(x, self), output)  # type: ignore[no-untyped-call]


class _Watched(torch.autograd.Function):
    """The identity, whose backward says that it is being run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, completion: _Completion) -> torch.Tensor:
        ctx.completion = completion
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        ctx.completion.begin()
        return cotangents[0], None


def share_of_mean(total: torch.Tensor, count: int, mesh: Mesh) -> torch.Tensor:
    """This rank's share of a mean over the samples of all replicas, of which a replica may have more than another.

    `total` is this rank's part of a sum that has `count` terms on its replica, which may be none. The mean over
    replicas, which `parallel` takes, is the mean over all terms if each sum is divided by the replicas' mean count:
    `total * replicas / (sum of the counts)`. Collective on the data replicas.
    Raises `ValueError` on all of them if there are no terms at all.
    """
    if mesh.data_replicas > 1:
        count = int(mesh.sum(torch.tensor([count]), over="data").item())
    if count == 0:
        raise ValueError("there is no mean over no samples")
    # In one step with a single replica, as a loss that knows nothing of replicas would be divided.
    return total / count if mesh.data_replicas == 1 else total * (mesh.data_replicas / count)


def broadcast_parameters(module: nn.Module, mesh: Mesh) -> None:
    """Give every rank rank 0's parameters, and of sharded ones the first replica's parts.

    Buffers stay as they are: they may hold a rank's own part of a field.
    Raises `ValueError` on all ranks if the ranks' parameters differ in name, shape or type. Collective on the world.
    """
    shards = shards_of(module)
    described = [
        (name, shards[name].whole_shape(value) if name in shards else tuple(value.shape), str(value.dtype))
        for name, value in module.named_parameters()
    ]
    digest = hashlib.sha256(repr(described).encode()).digest()
    differs = torch.tensor([int(mesh.broadcast_object(digest) != digest)])
    if mesh.max(differs).item():
        raise ValueError("the ranks built models whose parameters differ in name, shape or type")
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name in shards:
                dist.broadcast(value.data, src=mesh.state_rank, group=mesh.data_group)
            else:
                dist.broadcast(value.data, src=0, group=mesh.world_group)


def parallel(module: nn.Module, mesh: Mesh) -> DistributedDataParallel:
    """`module` under DistributedDataParallel, with its parameters taken from rank 0.

    After `backward()` of each rank's share of the loss every parameter's `.grad` holds, bit for bit the same on all
    ranks, the sum over state ranks and mean over data replicas; a sharded parameter's, on all ranks that hold the same
    part, the mean over data replicas. Gradients may be accumulated over several backward passes, also under
    `no_sync()`. Buffers are never communicated.
    Raises `ValueError` when no parameter requires a gradient. Collective on the world.
    """
    shards = shards_of(module)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not trained:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: there is nothing to sum")
    broadcast_parameters(module, mesh)
    replicated = [value for name, value in trained.items() if name not in shards]
    if replicated:
        ignore_in_data_parallel(module, list(shards))
    with warnings.catch_warnings():
        # Its successor would synchronise the buffers once, and they may hold a rank's own part of a field.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            process_group=mesh.world_group if replicated else mesh.data_group,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
    sharded = [value for name, value in trained.items() if name in shards]
    if replicated and (mesh.state_ranks > 1 or sharded):
        completion = _Completion(mesh.state_ranks, sharded, mesh)
        hooks = [value.register_hook(completion.scale) for value in replicated]  # type: ignore[no-untyped-call]
        weakref.finalize(wrapped, _remove, hooks).atexit = False
        wrapped.register_forward_hook(completion.watch)
    return wrapped


def clip_gradient_norm(module: nn.Module, limit: float, mesh: Mesh) -> torch.Tensor:
    """Scale the gradients down to a norm of `limit` all together, if it is larger; returns the norm it was.

    As torch.nn.utils.clip_grad_norm_, with all parts of sharded parameters counted once: the norm is that of the whole
    gradient and the same on every rank. Collective on the state ranks if there are sharded parameters.
    """
    shards = shards_of(module)
    gradients = {name: value.grad for name, value in module.named_parameters() if value.grad is not None}
    norm = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name not in shards])
    if shards:
        parts = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name in shards])
        norm = (norm.double().square() + mesh.sum(parts.double().square(), over="state")).sqrt()
    nn.utils.clip_grads_with_norm_(list(module.parameters()), limit, norm)
    return norm


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
