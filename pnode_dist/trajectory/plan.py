"""Dividing a memory budget between checkpoints and graphs.

A step whose graph is kept from the forward pass needs no second run, but a graph is many times larger than a
checkpoint, which saves more than one. Since a step that is run again serves its own adjoint, the work of a plan is
counted in forward steps, and the best division is the one with the fewest.
"""

from __future__ import annotations

from dataclasses import replace
from math import comb

from pnode_dist.errors import ConfigurationError
from pnode_dist.trajectory.budget import Slots, Trajectory, parse_size

_MOST_CANDIDATES = 256


def optimal_forward_steps(steps: int, slots: int) -> int:
    """The fewest forward steps, first runs included, with which `steps` steps can be reversed from `slots` checkpoints.

    (r + 1) n - C(s + r, r - 1) with r the least integer for which C(s + r, s) >= n.
    A. Griewank, A. Walther: Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000), eq. (2).
    Raises `ValueError` if there are several steps and no slot.
    """
    if steps == 1:
        return 1
    if slots < 1:
        raise ValueError(f"{steps} steps cannot be reversed without a checkpoint")
    slots = min(slots, steps - 1)
    repetitions = 1
    while comb(slots + repetitions, slots) < steps:
        repetitions += 1
    return (repetitions + 1) * steps - comb(slots + repetitions, repetitions - 1)


def divide(trajectory: Trajectory, slots: Slots, steps: int, graph_bytes: int) -> Slots:
    """How many steps at the end to keep as graphs of `graph_bytes` each, and how many checkpoints to hold beside them.

    `slots` is what `agree_on_slots` found without graphs. The graph of one step belongs to the working set of any
    adjoint and is not charged to `trajectory.ram`. At least one checkpoint remains unless every step is a graph. Of
    equal plans the one with more graphs is taken, whose backward pass starts at once. Looks at every number of graphs
    up to 256 and at as many evenly spaced ones beyond.

    Raises `ConfigurationError` when graphs of all steps were demanded and do not fit.
    """
    ram = parse_size(trajectory.ram)
    if (steps - 1) * graph_bytes <= ram:
        return replace(slots, ram=0, disk=0, graphs=steps)
    if trajectory.keep == "graph":
        raise ConfigurationError(
            f"trajectory: keep = 'graph': the graphs of {steps} steps need ram = {(steps - 1) * graph_bytes}, "
            f"more than {trajectory.ram!r}"
        )
    best, work = slots, optimal_forward_steps(steps, slots.ram + slots.disk) if slots.ram + slots.disk else steps**2
    most = ram // graph_bytes + 1
    for graphs in range(2, most + 1, -(-most // _MOST_CANDIDATES)):
        rest = steps - graphs
        left = ram - (graphs - 1) * graph_bytes
        candidate = replace(
            slots,
            ram=min(left // slots.checkpoint_bytes, rest) if slots.checkpoint_bytes else rest,
            disk=min(slots.disk, rest),
            graphs=graphs,
        )
        if candidate.ram + candidate.disk == 0:
            break
        needed = optimal_forward_steps(rest + 1, candidate.ram + candidate.disk) + graphs - 1
        if needed <= work:
            best, work = candidate, needed
    return best
