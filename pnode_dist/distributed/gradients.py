"""Parameter gradients over the mesh: the sum over state ranks, and the mean over data replicas.

Every rank differentiates its own share of the loss. The gradient of a replica is the sum of its ranks' gradients.
torch's DistributedDataParallel buckets the gradients and takes the mean over all ranks, so each rank's contribution is
first multiplied by the number of state ranks. (Replacing the mean by a sum would also scale the gradients that earlier
backward passes have accumulated.)

The gradient of a sharded parameter (`pnode_dist.distributed.sharding`) is complete on its rank, and only its mean over
replicas is taken. If all parameters are sharded, DistributedDataParallel takes that mean; otherwise `_Completion` does.
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
from pnode_dist.system.torch_releases import known_options


class _Completion:
    """The completion of a backward pass of DistributedDataParallel over all ranks.

    Multiplies each gradient by `factor` before it is averaged. At the end of the pass, averages the gradients of
    `sharded` parameters over the replicas, if DistributedDataParallel synchronises in this pass.
    """

    def __init__(self, factor: int, sharded: list[nn.Parameter], mesh: Mesh) -> None:
        self._factor, self._sharded, self._mesh = factor, sharded, mesh
        self._coming_through = self._synchronises = False

    def begin(self) -> None:
        """Begin when a backward pass reaches the module's output."""
        if not self._coming_through:
            self._coming_through = True
            at_end_of_backward(self.end)

    def end(self) -> None:
        """Average the gradients of sharded parameters at the end of the backward pass."""
        self._coming_through = False
        if self._synchronises:
            self._synchronises = False
            for value in self._sharded:
                # Every replica must take part, or the others would wait.
                if value.grad is None:
                    value.grad = torch.zeros_like(value)
                dist.all_reduce(value.grad, group=self._mesh.data_group)
                value.grad.div_(self._mesh.data_replicas)

    def scale(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply a gradient by the factor: the hook on every parameter that is not sharded."""
        return gradient * self._factor if self._coming_through else gradient

    def watch(self, module: DistributedDataParallel, inputs: Any, output: Any) -> Any:
        """Prepare for a backward pass: the forward hook of the wrapper."""
        self._coming_through = False
        if torch.is_grad_enabled():
            self._synchronises = module.require_backward_grad_sync and self._mesh.data_replicas > 1
        return tree_map_only(torch.Tensor, lambda x: _Watched.apply(x, self), output)  # type: ignore[no-untyped-call]


class _Watched(torch.autograd.Function):
    """The identity, whose backward calls `_Completion.begin`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, completion: _Completion) -> torch.Tensor:
        ctx.completion = completion
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        ctx.completion.begin()
        return cotangents[0], None


def share_of_mean(total: torch.Tensor, count: int, mesh: Mesh) -> torch.Tensor:
    """Return this rank's share of a mean over the samples of all replicas, which may have different numbers of them.

    `total` is this rank's part of a sum with `count` terms on its replica, possibly none. `parallel` takes the mean
    over replicas. That is the mean over all terms if each sum is divided by the mean count of the replicas: `total *
    replicas / (sum of the counts)`. Collective on the data replicas. Raises `ValueError` on all of them if there are no
    terms at all.
    """
    if mesh.data_replicas > 1:
        count = int(mesh.sum(torch.tensor([count]), over="data").item())
    if count == 0:
        raise ValueError("there is no mean over no samples")
    # A single division for a single replica has the same bits as a loss without replicas.
    return total / count if mesh.data_replicas == 1 else total * (mesh.data_replicas / count)


def broadcast_parameters(module: nn.Module, mesh: Mesh) -> None:
    """Copy the parameters of rank 0 to every rank, and sharded ones from the first replica.

    Buffers are not copied, because they may hold a rank's own part of a field.
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
    """Wrap `module` in DistributedDataParallel, with the parameters of rank 0. Collective on the world.

    After `backward()` of each rank's share of the loss, every parameter's `.grad` holds the sum over state ranks and
    mean over data replicas, with the same bits on all ranks. The `.grad` of a sharded parameter holds the mean over
    data replicas, with the same bits on all ranks with this part. Gradients may be accumulated over several backward
    passes, also under `no_sync()`. Buffers are never communicated. Raises `ValueError` if no parameter requires a
    gradient.
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
        # The option that replaces it would copy the buffers once, and they may hold a rank's own part of a field.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            process_group=mesh.world_group if replicated else mesh.data_group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # torch 2.6 broadcasts the parameters here once more: they are the same already.
            **known_options(DistributedDataParallel.__init__, init_sync=False),
        )
    sharded = [value for name, value in trained.items() if name in shards]
    if replicated and (mesh.state_ranks > 1 or sharded):
        completion = _Completion(mesh.state_ranks, sharded, mesh)
        hooks = [value.register_hook(completion.scale) for value in replicated]  # type: ignore[no-untyped-call]
        weakref.finalize(wrapped, _remove, hooks).atexit = False
        wrapped.register_forward_hook(completion.watch)
    return wrapped


def clip_gradient_norm(module: nn.Module, limit: float, mesh: Mesh) -> torch.Tensor:
    """Scale the gradients down to a total norm of at most `limit`. Returns the norm before.

    Like torch.nn.utils.clip_grad_norm_, with each part of a sharded parameter counted once: the norm is that of the
    whole gradient and the same on every rank. Collective on the state ranks if there are sharded parameters.
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
