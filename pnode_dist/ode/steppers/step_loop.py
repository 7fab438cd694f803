"""A traced step as several steps, before torch's compiler generates code of it.

torch.compile traces one step, with everything that torch can trace in f. The backends here make the graph of a segment
of it: a scan over the turns of the step, whose code does not grow with their number, or one copy of the step for each.
Exchanges between ranks have an order in the second form alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pnode_dist.system.torch_internals import scan_operator

Backend = Callable[[fx.GraphModule, Sequence[Any]], Any]
STATE, TURNS = "state", "turns"
"""The names of the arguments of a step: the parts of the state, and tensors with an entry `[steps, ...]` for each step.

The step reads the first entry of each of the latter alone. It returns the parts of the state after it, and may return
further values: the function of several steps returns these of all steps, stacked.
"""


def looping(backend: Backend) -> Backend:
    """Return a backend of torch.compile that runs a traced step in a loop over its turns, and compiles that."""

    def compile_loop(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        step = _Step(graph)
        # torch 2.13 generates code with an error for a loop of one turn.
        return backend(_copies(step, 1) if step.count(inputs) == 1 else _scan(step), inputs)

    return compile_loop


def repeating(backend: Backend) -> Backend:
    """Return a backend of torch.compile that runs a copy of a traced step for each of its turns, and compiles that."""

    def compile_copies(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        step = _Step(graph)
        return backend(_copies(step, int(step.count(inputs))), inputs)

    return compile_copies


@dataclass(frozen=True)
class _Step:
    """The graph of a step, and what its inputs stand for."""

    module: fx.GraphModule

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.module.graph.find_nodes(op="placeholder"))

    @property
    def state(self) -> list[fx.Node]:
        """The parts of the state, in order."""
        return self._of(STATE)

    @property
    def turns(self) -> list[fx.Node]:
        """The inputs with an entry for each step that the step depends on, in order."""
        return self._of(TURNS)

    def count(self, inputs: Sequence[Any]) -> Any:
        """Return the number of steps for these inputs, an integer or a symbol of torch's."""
        return inputs[self.placeholders.index(self.turns[0])].shape[0]

    @property
    def others(self) -> list[fx.Node]:
        """The inputs that are the same for all steps."""
        own = {*self.state, *self.turns}
        return [node for node in self.placeholders if node not in own and node.users]

    def _of(self, argument: str) -> list[fx.Node]:
        """Return the inputs that are the entries of a tuple: `l_state_1_`."""
        return sorted((node for node in self.placeholders if node.name.startswith(f"l_{argument}_")), key=_part)

    def copy_into(
        self, graph: fx.Graph, given: dict[fx.Node, fx.Node], entry: Callable[[fx.Node], fx.Node]
    ) -> list[fx.Node]:
        """Copy the step into a graph, and return the nodes of its results.

        `given` maps the inputs of the step to nodes of the graph. `entry` makes the node of the step's own entry.
        """
        nodes, turns = dict(given), self.turns
        for node in self.module.graph.nodes:
            if node.op == "output":
                results = [nodes[value] for value in node.args[0]]
                assert len(results) >= len(self.state), "a step returns the parts of the state"
                return results
            if node.args and node.args[0] in turns:
                assert node.args[1:] == (0,), "a step reads the first entries alone"
                nodes[node] = entry(node.args[0])
            elif node.op != "placeholder":
                nodes[node] = graph.node_copy(node, nodes.__getitem__)
        raise AssertionError("the graph of a step has an output")


def _scan(step: _Step) -> fx.GraphModule:
    body = fx.Graph()
    inputs = {node: body.placeholder(node.name) for node in (*step.state, *step.turns, *step.others)}
    results = step.copy_into(body, inputs, inputs.__getitem__)
    count = len(results)
    if count == len(step.state):
        # torch 2.13 cannot generate code of a scan without an output of each turn.
        results = [*results, body.call_function(torch.neg, (inputs[step.turns[-1]],))]
    body.output(tuple(results))
    graph = fx.Graph()
    given = {node: graph.node_copy(node) for node in step.placeholders}
    lists = [[given[node] for node in nodes] for nodes in (step.state, step.turns, step.others)]
    scanned = graph.call_function(scan_operator(), (graph.get_attr("step"), *lists))
    graph.output(tuple(graph.call_function(operator.getitem, (scanned, number)) for number in range(count)))
    return fx.GraphModule({"step": fx.GraphModule(step.module, body)}, graph)


def _copies(step: _Step, count: int) -> fx.GraphModule:
    graph = fx.Graph()
    given = {node: graph.node_copy(node) for node in step.placeholders}
    turns = {node: given[node] for node in step.turns}
    further: list[list[fx.Node]] = []
    for number in range(count):
        entries = {node: graph.call_function(operator.getitem, (turns[node], number)) for node in turns}
        results = step.copy_into(graph, given, entries.__getitem__)
        given |= dict(zip(step.state, results, strict=False))
        further.append(results[len(step.state) :])
    stacked = [graph.call_function(torch.stack, (list(values),)) for values in zip(*further, strict=True)]
    graph.output((*[given[node] for node in step.state], *stacked))
    return fx.GraphModule(step.module, graph)


def _part(node: fx.Node) -> int:
    """Return the number of the entry that a placeholder stands for: `l_state_1_`."""
    return int(node.name.rstrip("_").rsplit("_", 1)[1])
