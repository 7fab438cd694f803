"""Batch normalisation of samples that are spread over ranks, with the statistics of all of them."""

from __future__ import annotations

import torch

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.exchange import mesh_sum
from pnode_dist.exchange.compiled import exchange, is_compiled, number_of
from pnode_dist.nn.norm import follow
from pnode_dist.system.torch_internals import BatchNorm, evaluated_while_tracing


class SyncBatchNorm(BatchNorm):
    """torch.nn's batch norm of `[samples, num_features, *shape]`, each rank of the mesh with samples of its own.

    In training each channel is normalised over the samples of all ranks, state ranks and data replicas alike: the
    result, its gradient and the running statistics do not depend on how a batch is split over the mesh, and a rank may
    have no samples at all. Arguments, parameters, buffers and their names are torch's. (torch.nn.SyncBatchNorm does
    this on GPUs alone; `pnode_dist.nn.BatchNorm2d` is for one field that is split.)

    Variances are means of squared departures from the mean, in a second sum over the ranks, as in
    `pnode_dist.nn.norm`. `forward` is collective on the world in training, and so is its backward. Raises `ValueError`
    on all ranks in training for a single value in each channel.
    """

    def __init__(
        self,
        mesh: Mesh,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, dtype=dtype)
        self._mesh = mesh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise. Collective on the world in training."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self._scaled(x - self._channels(self.running_mean, x), self.running_var)
        axes = (0, *range(2, x.dim()))
        # In double precision the count is exact, and is reduced with the sums.
        sums = x.sum(axes).double()
        count = sums.new_tensor([x.numel() // self.num_features])
        total = mesh_sum(torch.cat([sums, count]), self._mesh)
        if is_compiled():
            # Compiled code cannot depend on a value, but an operation in it can raise an error.
            total = exchange(total, _registered_check(self._mesh), tuple(total.shape))
        else:
            _checked(total.detach(), self._mesh)
        mean, everywhere = total[:-1] / total[-1], total[-1].detach()
        departure = x - self._channels(mean.to(x.dtype), x)
        variance = mesh_sum(departure.square().sum(axes).double(), self._mesh) / everywhere
        if self.training and self.running_mean is not None:
            follow(self, mean.detach(), variance.detach() * everywhere / (everywhere - 1))
        return self._scaled(departure, variance.to(x.dtype))

    def _scaled(self, departure: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """Scale departures from the mean by the deviation and the weight, and add the bias."""
        factor = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            factor = factor * self.weight
        scaled = departure * self._channels(factor, departure)
        return scaled if self.bias is None else scaled + self._channels(self.bias, departure)

    @staticmethod
    def _channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Reshape values of channels `[num_features]` to broadcast with `like` `[samples, num_features, *shape]`."""
        return values.view(1, -1, *(1,) * (like.dim() - 2))


@evaluated_while_tracing
def _registered_check(mesh: Mesh) -> int:
    return number_of(mesh, "SyncBatchNorm", _checked, _unchanged)


def _checked(total: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the sums `[..., num_features + 1]` if the last one, the number of values, allows a variance."""
    if total[-1] <= 1:
        raise ValueError(f"SyncBatchNorm: {int(total[-1])} value(s) in a channel have no variance: give it more")
    return total.clone()


def _unchanged(cotangent: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    return cotangent.clone()
