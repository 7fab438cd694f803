"""Message passing on a partitioned graph.

J. Gilmer et al.: Neural message passing for quantum chemistry, ICML 2017, equations 1 and 2. A rank computes the
messages to its own nodes, for which it needs the states of their neighbours and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.graph_ghosts import with_ghosts
from pnode_dist.partition.graph import GraphPartition

Aggregate = Literal["sum", "mean", "max"]
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
_ROWS = -2


class MessagePassing(nn.Module):
    """The layer update(x_i, aggregate of message(x_i, x_j, e_ji) over the edges j -> i) at every node i.

    `message(x_target, x_source)` is given `[..., local_edges, features]` for both ends of each edge, and as a third
    argument the edges' attributes if there are any; it returns `[..., local_edges, messages]`. They are aggregated at
    the targets by `sum`, `mean` or `max`, where no edge leads to 0. `update(x, aggregated)` makes the output of
    `[..., local_nodes, features]` and `[..., local_nodes, messages]`; without it the output is what was aggregated.
    Sums are taken in the order of the edges, the same at any number of ranks. Where several messages are the largest,
    they share the gradient. The parameters are those of `message` and `update`, and every rank has all of them: the
    sum of the ranks' gradients, which `pnode_dist.distributed.gradients.parallel` makes, is the gradient. `forward` is
    collective on the partition's communicator, and so is its backward. Raises `ConfigurationError` for another
    `aggregate`.
    """

    def __init__(
        self,
        partition: GraphPartition,
        message: nn.Module | Callable[..., torch.Tensor],
        aggregate: Aggregate = "sum",
        update: nn.Module | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        if aggregate not in AGGREGATES:
            raise ConfigurationError(f"aggregate = {aggregate!r}: must be one of {', '.join(AGGREGATES)}")
        self.partition = partition
        self.message, self.update = message, update
        self.aggregate = aggregate

    def forward(self, x: torch.Tensor, edge_attributes: torch.Tensor | None = None) -> torch.Tensor:
        """Exchange ghosts, compute messages, aggregate, update. Collective on the partition's communicator.

        `x` is `[..., local_nodes, features]`, and `edge_attributes` `[..., local_edges, attributes]`, in the form that
        `scatter_edges` of the partition returns.
        """
        seen = with_ghosts(x, self.partition)
        targets, sources = self.partition.targets.to(x.device), self.partition.sources.to(x.device)
        ends = [x.index_select(_ROWS, targets), seen.index_select(_ROWS, sources)]
        messages = self.message(*ends, *([] if edge_attributes is None else [edge_attributes]))
        aggregated = aggregate_at_targets(messages, self.partition, self.aggregate)
        return aggregated if self.update is None else self.update(x, aggregated)

    def extra_repr(self) -> str:
        """Return the aggregation for `repr`."""
        return f"aggregate={self.aggregate!r}"


def aggregate_at_targets(
    messages: torch.Tensor, partition: GraphPartition, aggregate: Aggregate = "sum"
) -> torch.Tensor:
    """Aggregate `[..., local_edges, messages]` to `[..., local_nodes, messages]`, 0 without edges. Not collective."""
    targets = partition.targets.to(messages.device)
    nodes = messages.new_zeros((*messages.shape[:_ROWS], partition.local_shape[0], messages.shape[-1]))
    if aggregate == "max":
        index = targets.unsqueeze(-1).expand(messages.shape)
        return nodes.scatter_reduce(_ROWS, index, messages, "amax", include_self=False)
    total = nodes.index_add(_ROWS, targets, messages)
    if aggregate == "sum":
        return total
    # Unlike torch.bincount, whose length depends on its values, this can be compiled.
    counts = targets.new_zeros(partition.local_shape[0]).index_add(0, targets, torch.ones_like(targets))
    return total / counts.clamp(min=1).unsqueeze(-1)


class GraphConv(nn.Module):
    """The layer D^(-1/2) (A + I) D^(-1/2) X W + b.

    It maps `[..., local_nodes, in_features]` to `[..., local_nodes, out_features]`.

    T. N. Kipf, M. Welling: Semi-supervised classification with graph convolutional networks, ICLR 2017, arXiv
    1609.02907, equation 2. A is the adjacency matrix of the partition's edges, a row for each target, D the diagonal of
    the row sums of A + I; `edge_weight` `[local_edges]` are A's entries, 1 by default, and not differentiated. `weight`
    and `bias` have torch.nn.Linear's names, shapes and initialisation. What is exchanged is the narrower of X and X W.
    Making one and `forward` are collective on the partition's communicator, and so is its backward.
    """

    edge_coefficients: torch.Tensor
    node_coefficients: torch.Tensor

    def __init__(
        self,
        partition: GraphPartition,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        edge_weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        template = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        self.partition = partition
        self.weight, self.bias = template.weight, template.bias
        entries = torch.ones(len(partition.targets)) if edge_weight is None else edge_weight.detach()
        entries = entries.double().unsqueeze(-1)
        # Zero rows and columns for sums that are not positive, which only the user's weights can cause.
        degree = 1 + aggregate_at_targets(entries, partition)
        scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
        sources = with_ghosts(scale, partition).index_select(_ROWS, partition.sources)
        coefficients = scale.index_select(_ROWS, partition.targets) * entries * sources
        self.register_buffer("edge_coefficients", coefficients.to(self.weight.dtype), persistent=False)
        self.register_buffer("node_coefficients", scale.square().to(self.weight.dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve. Collective on the partition's communicator."""
        widens = self.weight.shape[0] > self.weight.shape[1]
        if not widens:
            x = functional.linear(x, self.weight)
        sources = with_ghosts(x, self.partition).index_select(_ROWS, self.partition.sources.to(x.device))
        x = self.node_coefficients * x + aggregate_at_targets(self.edge_coefficients * sources, self.partition)
        if widens:
            x = functional.linear(x, self.weight)
        return x if self.bias is None else x + self.bias

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}"
