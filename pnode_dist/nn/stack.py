"""A sequence of stencils with one exchange for all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import neighbour_halo, pad_edges
from pnode_dist.exchange.compiled import is_compiled
from pnode_dist.nn.activation import POINTWISE
from pnode_dist.nn.conv import Conv1d, Conv2d, Conv3d
from pnode_dist.nn.halo_cost import fitted, seconds_apart, seconds_at_once
from pnode_dist.partition.grid import GridPartition

Exchange = Literal["layer", "once", "auto"]
Convolution = Conv1d | Conv2d | Conv3d

_REPEATS = 5


class Stack(nn.Sequential):
    """Convolutions of `pnode_dist.nn` and activations in sequence, `[..., *local, channels]` each, on one grid.

    `exchange="layer"`: each convolution exchanges the halo that it needs. `exchange="once"`: the first exchanges as
    much as all together need, `halo_width`, and each rank computes again what is its neighbours' but is needed for its
    own points; at the edges of the domain every layer's input follows the partition's rules as before. The numbers
    agree up to rounding. `exchange="auto"` measures once, for each leading shape and type of the input, what exchanges
    and redundant computing take, and keeps to what `pnode_dist.nn.halo_cost` says is cheaper, the same on all ranks;
    where the last bits must not depend on such a measurement, say which. It is "layer" where a block is too small for
    the wide halo, and in compiled code unless a call outside compiled code has measured before.

    Layers may be in nn.Sequential, in any depth, as `Stack(partition, *convert(module, partition))` has them; a
    state_dict has their names. `forward` is collective on the partition's communicator, and so is its backward.
    Raises `ConfigurationError` for another `exchange`, for layers that see more than a stencil, such as norms with
    statistics over the whole grid, and with "once" for blocks smaller than the halo.
    """

    def __init__(self, partition: GridPartition, *layers: nn.Module, exchange: Exchange = "layer") -> None:
        super().__init__(*layers)
        if exchange not in get_args(Exchange):
            raise ConfigurationError(f"Stack: exchange = {exchange!r}: must be one of {', '.join(get_args(Exchange))}")
        self.partition, self.exchange = partition, exchange
        for name, layer in _leaves(self, ""):
            if not isinstance(layer, POINTWISE) and (
                not isinstance(layer, Convolution) or layer.partition.ranges != partition.ranges
            ):
                kinds = "Conv1d, Conv2d, Conv3d of pnode_dist.nn on the stack's grid"
                raise ConfigurationError(
                    f"Stack: layer {name!r} is a {type(layer).__name__}: must be one of {kinds}, or an activation that "
                    "acts on each number by itself"
                )
        self.layers = [layer for _, layer in _leaves(self, "")]
        widths = [layer.halo_width for layer in self.layers if isinstance(layer, Convolution)]
        self.halo_width = tuple(map(sum, zip(*widths, strict=True))) if widths else (0,) * len(partition.shape)
        smallest = tuple(partition.smallest_block(axis) for axis in range(len(partition.shape)))
        self._fits = all(width <= block for width, block in zip(self.halo_width, smallest, strict=True))
        if exchange == "once" and not self._fits:
            raise ConfigurationError(
                f"Stack: exchange = 'once' needs a halo of {self.halo_width}: must be at most what the smallest block "
                f"of any rank has, {smallest}"
            )
        self._chosen: dict[tuple[tuple[int, ...], torch.dtype], bool] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all layers. Collective on the partition's communicator."""
        if self._at_once(x):
            return self._wide(neighbour_halo(x, self.partition, self.halo_width))
        for layer in self.layers:
            x = layer(x)
        return x

    def extra_repr(self) -> str:
        """Return the kind of exchange for `repr`."""
        return f"exchange={self.exchange!r}"

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all layers to a block with its neighbours' points. Each convolution removes its halo."""
        for layer in self.layers:
            if isinstance(layer, Convolution):
                x = layer.convolve(pad_edges(x, self.partition, layer.halo_width))
            else:
                x = layer(x)
        return x

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all layers with zeros for halos, to measure the operations without exchanges."""
        for layer in self.layers:
            if isinstance(layer, Convolution):
                shape = [n + 2 * w for n, w in zip(self.partition.local_shape, layer.halo_width, strict=False)]
                x = layer.convolve(x.new_zeros(*x.shape[: -1 - len(shape)], *shape, x.shape[-1]))
            else:
                x = layer(x)
        return x

    def _at_once(self, x: torch.Tensor) -> bool:
        """Return True to use a single exchange. The same on all ranks."""
        if self.exchange != "auto" or not self._fits or self.partition.comm.size == 1:
            return self.exchange == "once"
        key = (tuple(x.shape[: -1 - len(self.partition.shape)]), x.dtype)
        if key not in self._chosen:
            if is_compiled():
                # Tracing must not communicate: one rank of a node may trace while the others wait.
                return False
            self._chosen[key] = self._cheaper_at_once(x.shape, x.dtype)
        return self._chosen[key]

    @torch.no_grad()
    def _cheaper_at_once(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        """Measure both kinds of exchange. Returns True if a single one is cheaper. Collective on the partition."""
        partition, comm = self.partition, self.partition.comm
        block = torch.zeros(shape, dtype=dtype)
        convolutions = [layer for layer in self.layers if isinstance(layer, Convolution) and any(layer.halo_width)]
        if len(convolutions) < 2:
            return False
        samples = math.prod(shape[: -1 - len(partition.shape)]) * block.element_size()
        sizes = [
            samples * layer.weight.shape[1] * layer.groups * self._ghosts(layer.halo_width) for layer in convolutions
        ]
        size = samples * shape[-1] * self._ghosts(self.halo_width)
        narrowest = min((layer.halo_width for layer in convolutions), key=sum)

        def exchange(width: tuple[int, ...]) -> float:
            return _seconds(lambda: neighbour_halo(block, partition, width), comm)

        cost = fitted(
            (samples * shape[-1] * self._ghosts(narrowest), exchange(narrowest)), (size, exchange(self.halo_width))
        )
        wide = neighbour_halo(block, partition, self.halo_width)
        redundant = _seconds(lambda: self._wide(wide), comm) - _seconds(lambda: self._narrow(block), comm)
        times = np.array([seconds_apart(cost, sizes), seconds_at_once(cost, size, max(0.0, redundant))])
        comm.Allreduce(MPI.IN_PLACE, times, MPI.MAX)
        return bool(times[1] < times[0])

    def _ghosts(self, width: tuple[int, ...]) -> int:
        """Return the number of neighbours' points around this rank's block."""
        own = self.partition.local_shape[:-1]
        around = [
            n + w * sum(self.partition.neighbour(axis, step) != MPI.PROC_NULL for step in (-1, 1))
            for axis, (n, w) in enumerate(zip(own, width, strict=True))
        ]
        return math.prod(around) - math.prod(own)


def _leaves(module: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in order, with their names."""
    for name, layer in module.named_children():
        if type(layer) is nn.Sequential:
            yield from _leaves(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer


def _seconds(action: Callable[[], object], comm: MPI.Comm) -> float:
    """Measure the least seconds of `action`, begun by all ranks together. Collective on `comm`."""
    action()
    times = []
    for _ in range(_REPEATS):
        comm.Barrier()
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)
