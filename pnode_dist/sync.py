"""Parameter gradients over the mesh: summed over state ranks, averaged over data replicas.

Every rank differentiates its own share of the loss, so a replica's gradient is the sum of its ranks' gradients, and
the gradient of the mean loss over replicas is that sum divided by their number. torch's DistributedDataParallel does
the bucketing and takes the mean over all ranks. What each rank contributes is therefore multiplied by the number of
state ranks first: unlike a sum in place of the mean, that leaves alone what earlier backward passes have accumulated.
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
from torch.utils import _pytree

from pnode_dist.mesh import Mesh


class _Contribution:
    """Multiplies parameter gradients by `factor` while a backward pass comes through the wrapped module."""

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._coming_through = False

    def begin(self) -> None:
        """Called when a backward pass reaches the module's output."""
        if not self._coming_through:
            self._coming_through = True
            torch.autograd.Variable._execution_engine.queue_callback(self.end)

    def end(self) -> None:
        """Called when that backward pass is over."""
        self._coming_through = False

    def scale(self, gradient: torch.Tensor) -> torch.Tensor:
        """The hook of every parameter."""
        return gradient * self._factor if self._coming_through else gradient

    def watch(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The forward hook of the wrapper."""
        self.end()
        return _pytree.tree_map_only(torch.Tensor, lambda x: _Watched.apply(x, self), output)  # type: ignore[no-untyped-call]


class _Watched(torch.autograd.Function):
    """The identity, whose backward says that it is being run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, contribution: _Contribution) -> torch.Tensor:
        ctx.contribution = contribution
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        ctx.contribution.begin()
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
    """Give every rank rank 0's parameters. Buffers stay as they are: they may hold a rank's own part of a field.

    Raises `ValueError` on all ranks if the ranks' parameters differ in name, shape or type. Collective on the world.
    """
    described = [(name, tuple(value.shape), str(value.dtype)) for name, value in module.named_parameters()]
    digest = hashlib.sha256(repr(described).encode()).digest()
    differs = torch.tensor([int(mesh.broadcast_object(digest) != digest)])
    if mesh.max(differs).item():
        raise ValueError("the ranks built models whose parameters differ in name, shape or type")
    with torch.no_grad():
        for value in module.parameters():
            dist.broadcast(value.data, src=0, group=mesh.world_group)


def parallel(module: nn.Module, mesh: Mesh) -> DistributedDataParallel:
    """`module` under DistributedDataParallel over the whole mesh, with its parameters taken from rank 0.

    After `backward()` of each rank's share of the loss every parameter's `.grad` holds, bit for bit the same on all
    ranks, the sum over state ranks and mean over data replicas. Gradients may be accumulated over several backward
    passes, also under `no_sync()`. Buffers are never communicated.
    Raises `ValueError` when no parameter requires a gradient. Collective on the world.
    """
    if not any(value.requires_grad for value in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: there is nothing to sum")
    broadcast_parameters(module, mesh)
    with warnings.catch_warnings():
        # Its successor would synchronise the buffers once, and they may hold a rank's own part of a field.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            process_group=mesh.world_group,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
    if mesh.state_ranks > 1:
        contribution = _Contribution(mesh.state_ranks)
        trained = [value for value in module.parameters() if value.requires_grad]
        hooks = [value.register_hook(contribution.scale) for value in trained]  # type: ignore[no-untyped-call]
        weakref.finalize(wrapped, _remove, hooks).atexit = False
        wrapped.register_forward_hook(contribution.watch)
    return wrapped


def _remove(hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
