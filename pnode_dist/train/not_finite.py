"""Where a value that is not finite comes from: the batch is done again, and what every module computes is looked at.

A step notices for nothing that its loss or gradient is not finite. Nothing has been changed by then, so that the same
values come up once more, and in a right-hand side they are named with the time of the solve.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.system.torch_internals import tree_leaves
from pnode_dist.train.preemption import GivenUp
from pnode_dist.train.problem import Batch, Problem


@dataclass(frozen=True)
class _Sight:
    """What a rank has seen first that was not finite, after so many looks: all ranks look alike."""

    looks: int
    words: str


class _Lookout:
    """Looks, while it is `posted`, at what the modules of a model are given and return."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._times: list[str] = []
        self._looks = 0
        self.seen: _Sight | None = None

    @contextmanager
    def posted(self) -> Iterator[None]:
        """Look for so long."""
        hooks = []
        for name, module in self._model.named_modules():
            described = f"{name} ({type(module).__name__})" if name else type(module).__name__
            hooks.append(module.register_forward_pre_hook(self._before(described)))
            hooks.append(module.register_forward_hook(self._after(described)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def look(self, values: Any, words: str) -> None:
        """Remember the words if nothing has been seen before, and some of these values are not finite."""
        self._looks += 1
        if self.seen is None and not _finite(values):
            self.seen = _Sight(self._looks, words)

    @property
    def _at(self) -> str:
        return self._times[-1] if self._times else ""

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if _is_right_hand_side(inputs):
                self._times.append(f" at t = {float(inputs[0]):.6g}")
                self.look(inputs[1], f"the state that {name} is given{self._at}")

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            what = "value" if self.seen or _finite(inputs) else "input"
            self.look(output, f"the {what} of {name}{self._at}")
            if _is_right_hand_side(inputs):
                # In a backward pass what comes back to the value is seen before what goes on to the state.
                self._look_back(output, f"the gradient by the value of {name}{self._at}")
                self._look_back(inputs[1], f"the gradient by the state of {name}{self._at}")
                self._times.pop()

        return hook

    def _look_back(self, values: Any, words: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self.look(gradient, words))  # type: ignore[no-untyped-call]


def _is_right_hand_side(inputs: tuple[Any, ...]) -> bool:
    """Whether a module was called as f(t, u, ...)."""
    time = inputs[0] if len(inputs) > 1 else None
    return isinstance(time, torch.Tensor) and time.dim() == 0 and time.is_floating_point()


def _finite(values: Any) -> bool:
    numbers = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return all(bool(torch.isfinite(value.detach()).all()) for value in numbers)


def origin(problem: Problem, batch: Batch, share: float, mesh: Mesh, backward: bool) -> str:
    """Which ranks a value comes from that is not finite, and where it is first seen, in words; empty if nobody knows.

    `share` is this rank's share of the loss, as it was computed from `batch`. The loss is computed again, and with
    `backward` its gradient. Collective on the world; the same on all ranks.
    """
    lookout = _Lookout(problem.model)
    # A solver may find no solution for such values, or the run be asked to stop: on all ranks alike.
    with lookout.posted(), suppress(ArithmeticError, GivenUp):
        _again(problem, batch, lookout, backward)
    found = mesh.gather_object((socket.gethostname(), math.isfinite(share), lookout.seen)) or ()
    return str(mesh.broadcast_object(_in_words(list(found))))


def _again(problem: Problem, batch: Batch, lookout: _Lookout, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        share = problem.loss(problem.model, batch)
    lookout.look(share, "the loss")
    if not backward:
        return
    named = [(name, value) for name, value in problem.model.named_parameters() if value.requires_grad]
    gradients = torch.autograd.grad(share, [value for _, value in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        lookout.look(gradient, f"the gradient by {name}")


def _in_words(ranks: list[tuple[str, bool, _Sight | None]]) -> str:
    """What all ranks have seen, from host, whether the share was finite, and sight of each."""
    sights = [sight for _, _, sight in ranks if sight is not None]
    first = min(sights, key=lambda sight: sight.looks, default=None)
    named = []
    for rank, (host, finite, sight) in enumerate(ranks):
        if not finite if first is None else sight is not None and sight.looks == first.looks:
            named.append(f"rank {rank} ({host})")
    if not named:
        return ""
    return f"; it comes from {', '.join(named)}" + ("" if first is None else f", first seen in {first.words}")
