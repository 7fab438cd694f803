"""Localisation of non-finite values: recompute the batch and inspect the inputs and outputs of every module.

An optimiser step detects a non-finite loss or gradient at no extra cost, before it changes any state. Recomputing the
batch therefore reproduces the same values. Values in a right-hand side are reported with the time of the solve.
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
from pnode_dist.train.preemption import SolveAbandoned
from pnode_dist.train.problem import Batch, Problem


@dataclass(frozen=True)
class _Finding:
    """First non-finite value on a rank, and the index of its inspection; all ranks inspect in the same order."""

    inspections: int
    words: str


class _Inspector:
    """Inspect the inputs and outputs of the modules of a model inside the context `inspecting`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._times: list[str] = []
        self._inspections = 0
        self.seen: _Finding | None = None

    @contextmanager
    def inspecting(self) -> Iterator[None]:
        """Register the hooks on all modules, and remove them on exit."""
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

    def inspect(self, values: Any, words: str) -> None:
        """Record `words` if some of `values` are not finite and nothing was recorded before."""
        self._inspections += 1
        if self.seen is None and not _finite(values):
            self.seen = _Finding(self._inspections, words)

    @property
    def _at(self) -> str:
        return self._times[-1] if self._times else ""

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if _is_right_hand_side(inputs):
                self._times.append(f" at t = {float(inputs[0]):.6g}")
                self.inspect(inputs[1], f"the state that {name} is given{self._at}")

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            what = "value" if self.seen or _finite(inputs) else "input"
            self.inspect(output, f"the {what} of {name}{self._at}")
            if _is_right_hand_side(inputs):
                # A backward pass computes the gradient with respect to the value before that with respect to the state.
                self._look_back(output, f"the gradient by the value of {name}{self._at}")
                self._look_back(inputs[1], f"the gradient by the state of {name}{self._at}")
                self._times.pop()

        return hook

    def _look_back(self, values: Any, words: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda gradient: self.inspect(gradient, words))  # type: ignore[no-untyped-call]


def _is_right_hand_side(inputs: tuple[Any, ...]) -> bool:
    """Return True if a module was called as f(t, u, ...)."""
    time = inputs[0] if len(inputs) > 1 else None
    return isinstance(time, torch.Tensor) and time.dim() == 0 and time.is_floating_point()


def _finite(values: Any) -> bool:
    numbers = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return all(bool(torch.isfinite(value.detach()).all()) for value in numbers)


def origin(problem: Problem, batch: Batch, share: float, mesh: Mesh, backward: bool) -> str:
    """Describe the ranks where a non-finite value originates and its first occurrence; empty if none is found.

    `share` is this rank's share of the loss, as computed from `batch`. The loss is recomputed, with its gradient if
    `backward`. The text is the same on all ranks. Collective on the world.
    """
    inspector = _Inspector(problem.model)
    # The solver may fail for such values, or a request to stop may arrive; both are raised on all ranks.
    with inspector.inspecting(), suppress(ArithmeticError, SolveAbandoned):
        _again(problem, batch, inspector, backward)
    found = mesh.gather_object((socket.gethostname(), math.isfinite(share), inspector.seen)) or ()
    return str(mesh.broadcast_object(_in_words(list(found))))


def _again(problem: Problem, batch: Batch, inspector: _Inspector, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        share = problem.loss(problem.model, batch)
    inspector.inspect(share, "the loss")
    if not backward:
        return
    named = [(name, value) for name, value in problem.model.named_parameters() if value.requires_grad]
    gradients = torch.autograd.grad(share, [value for _, value in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        inspector.inspect(gradient, f"the gradient by {name}")


def _in_words(ranks: list[tuple[str, bool, _Finding | None]]) -> str:
    """Describe the first occurrence from each rank's host, whether its share was finite, and its recorded value."""
    findings = [finding for _, _, finding in ranks if finding is not None]
    first = min(findings, key=lambda finding: finding.inspections, default=None)
    named = []
    for rank, (host, finite, finding) in enumerate(ranks):
        if not finite if first is None else finding is not None and finding.inspections == first.inspections:
            named.append(f"rank {rank} ({host})")
    if not named:
        return ""
    return f"; it comes from {', '.join(named)}" + ("" if first is None else f", first seen in {first.words}")
