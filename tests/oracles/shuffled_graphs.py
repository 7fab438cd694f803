"""A backend of torch.compile that puts operations in any order that their data allows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import fx


class Shuffled:
    """Backend that draws the order of forward and backward operations from a seed, and removes unused ones.

    Splits graphs into forward and backward as inductor does. `orders` are the orders of the graphs that it was given.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.orders: list[list[str]] = []

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        def compiled(traced: fx.GraphModule, _: Any) -> Callable[..., Any]:
            self._shuffle(traced)
            return make_boxed_func(traced)

        backend = aot_autograd(
            fw_compiler=compiled, bw_compiler=compiled, partition_fn=min_cut_rematerialization_partition
        )
        return backend(graph, inputs)

    def _shuffle(self, traced: fx.GraphModule) -> None:
        """Rebuild a graph from nodes drawn among those whose inputs exist."""
        traced.graph.eliminate_dead_code()
        nodes = list(traced.graph.nodes)
        missing = {node: len(node.all_input_nodes) for node in nodes}
        # Inputs keep their order, and the output is last.
        first = [node for node in nodes if node.op in ("placeholder", "get_attr")]
        ready = [node for node in nodes if not missing[node] and node not in first]
        new = fx.Graph(traced)
        copies: dict[fx.Node, fx.Node] = {}
        while first or ready:
            node = first.pop(0) if first else ready.pop(self._random.randrange(len(ready)))
            copies[node] = new.node_copy(node, copies.__getitem__)
            for user in node.users:
                missing[user] -= 1
                if not missing[user] and user.op != "output":
                    ready.append(user)
        new.output(fx.map_arg(nodes[-1].args[0], copies.__getitem__))
        self.orders.append([str(node.target) for node in new.nodes if node.op == "call_function"])
        traced.graph = new
        traced.recompile()
