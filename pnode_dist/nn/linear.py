"""A dense layer between vectors that are split over ranks.

M. Shoeybi et al.: Megatron-LM: training multi-billion parameter language models using model parallelism, arXiv
1909.08053 (2019), section 3: a layer split by outputs, followed by one split by inputs, needs one exchange each.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange import gather_vector, reduce_vector
from pnode_dist.partition.dense import DensePartition

Split = Literal["column", "row"]


class Linear(nn.Module):
    """torch.nn.Linear from one partitioned vector to another, `[..., inputs] -> [..., outputs]`, local parts both.

    `split="column"`: every rank gathers the input and computes its part of the output. `split="row"`: every rank
    computes what its part of the input contributes to the whole output, and the contributions are added up. Both give
    the same numbers, up to rounding, and do the same work; by default the one that sends less is taken, "column" for
    more outputs than inputs and "row" for fewer.
    `weight` and `bias` have torch.nn.Linear's names, shapes and initialisation, so a state_dict goes either way. All
    ranks hold all of them and use their own rows or columns: the sum of the ranks' gradients, which
    `pnode_dist.sync.parallel` makes, is the gradient. `forward` is collective on the partitions' communicator, and so
    is its backward. Raises `ConfigurationError` for another split, or partitions over different numbers of ranks.
    """

    def __init__(
        self,
        inputs: DensePartition,
        outputs: DensePartition,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        split: Split | None = None,
    ) -> None:
        super().__init__()
        if split not in (None, "column", "row"):
            raise ConfigurationError(f"split = {split!r}: must be 'column', 'row' or None")
        if inputs.comm.size != outputs.comm.size:
            raise ConfigurationError(
                f"Linear: the inputs are on {inputs.comm.size} ranks and the outputs on {outputs.comm.size}: must be "
                "the same"
            )
        template = nn.Linear(inputs.size, outputs.size, bias=bias, dtype=dtype)
        self.inputs, self.outputs = inputs, outputs
        self.split: Split = split or ("column" if inputs.size <= outputs.size else "row")
        self.weight, self.bias = template.weight, template.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply and add. Collective on the partitions' communicator."""
        rows, columns = slice(*self.outputs.owned), slice(*self.inputs.owned)
        bias = None if self.bias is None else self.bias[rows]
        if self.split == "column":
            return functional.linear(gather_vector(x, self.inputs), self.weight[rows], bias)
        local = reduce_vector(functional.linear(x, self.weight[:, columns]), self.outputs)
        return local if bias is None else local + bias

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{self.inputs.size}, {self.outputs.size}, split={self.split!r}"
