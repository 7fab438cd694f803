"""A dense layer between partitioned vectors.

M. Shoeybi et al.: Megatron-LM: training multi-billion parameter language models using model parallelism, arXiv
1909.08053 (2019), section 3: a layer split by outputs, followed by one split by inputs, needs one exchange each.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.distributed.sharding import Shard
from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import gather_vector, reduce_vector
from pnode_dist.partition.dense import DensePartition

Split = Literal["column", "row"]

_DRAWN_AT_ONCE = 1 << 18


class Linear(nn.Module):
    """torch.nn.Linear from one partitioned vector to another, `[..., inputs] -> [..., outputs]`, local parts both.

    `split="column"`: every rank gathers the input and computes its part of the output. `split="row"`: every rank
    computes what its part of the input contributes to the whole output, and the contributions are added up. Both give
    the same numbers, up to rounding, and do the same work; by default the one that sends less is taken, "column" for
    more outputs than inputs and "row" for fewer.
    `weight` and `bias` have torch.nn.Linear's names, shapes and initialisation, so a state_dict goes either way. All
    ranks hold all of them and use their own rows or columns: the sum of the ranks' gradients, which
    `pnode_dist.distributed.gradients.parallel` makes, is the gradient.
    With `shard=True` a rank holds what it uses and no more: with "column" its rows of the weight, with "row" its
    columns, and its part of the bias, with the same values as before under the same seed on all ranks. Their gradients
    are complete as they are, and `parallel` takes their mean over replicas. `pnode_dist.distributed.sharding` makes
    state_dicts of whole tensors and takes them. `forward` is collective on the partitions' communicator, and so is its
    backward. Raises `ConfigurationError` for another split, or partitions over different numbers of ranks.
    """

    def __init__(
        self,
        inputs: DensePartition,
        outputs: DensePartition,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        split: Split | None = None,
        shard: bool = False,
    ) -> None:
        super().__init__()
        if split not in (None, "column", "row"):
            raise ConfigurationError(f"split = {split!r}: must be 'column', 'row' or None")
        if inputs.comm.size != outputs.comm.size:
            raise ConfigurationError(
                f"Linear: the inputs are on {inputs.comm.size} ranks and the outputs on {outputs.comm.size}: must be "
                "the same"
            )
        self.inputs, self.outputs = inputs, outputs
        self.split: Split = split or ("column" if inputs.size <= outputs.size else "row")
        of_weight = Shard(outputs, 0) if self.split == "column" else Shard(inputs, 1)
        self._shards = {"weight": of_weight, "bias": Shard(outputs, 0)}
        self.parameter_shards: dict[str, Shard] = {}
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        if shard:
            self.weight, self.bias = _own_parts(inputs.size, outputs.size, bias, dtype, self._shards)
            self.parameter_shards = self._shards if bias else {"weight": of_weight}
        else:
            template = nn.Linear(inputs.size, outputs.size, bias=bias, dtype=dtype)
            self.weight, self.bias = template.weight, template.bias

    def _own(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return the part of a parameter that this rank uses."""
        return value if name in self.parameter_shards else self._shards[name].part_of(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply and add. Collective on the partitions' communicator."""
        weight = self._own("weight", self.weight)
        bias = None if self.bias is None else self._own("bias", self.bias)
        if self.split == "column":
            return functional.linear(gather_vector(x, self.inputs), weight, bias)
        local = reduce_vector(functional.linear(x, weight), self.outputs)
        return local if bias is None else local + bias

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        shard = ", shard=True" if self.parameter_shards else ""
        return f"{self.inputs.size}, {self.outputs.size}, split={self.split!r}{shard}"


def _own_parts(
    inputs: int, outputs: int, bias: bool, dtype: torch.dtype | None, shards: dict[str, Shard]
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return this rank's parts of the weight and bias that torch.nn.Linear would draw.

    The whole weight is drawn, to keep the order of the generator, but only a few rows at a time.
    """
    shard = shards["weight"]
    shape = [outputs, inputs]
    shape[shard.axis] = shard.length
    weight = torch.empty(shape, dtype=dtype)
    rows = max(1, _DRAWN_AT_ONCE // inputs)
    first = shard.partition.owned[0] if shard.axis == 0 else 0
    for begin in range(0, outputs, rows):
        drawn = torch.empty(min(rows, outputs - begin), inputs, dtype=dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        if shard.axis == 1:
            weight[begin : begin + len(drawn)] = shard.part_of(drawn)
        else:
            low, high = max(begin, first), min(begin + len(drawn), first + len(weight))
            if low < high:
                weight[low - first : high - first] = drawn[low - begin : high - begin]
    if not bias:
        return nn.Parameter(weight), None
    bound = 1 / math.sqrt(inputs)
    whole = nn.init.uniform_(torch.empty(outputs, dtype=dtype), -bound, bound)
    return nn.Parameter(weight), nn.Parameter(shards["bias"].part_of(whole).clone())
