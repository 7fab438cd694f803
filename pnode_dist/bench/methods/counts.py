"""Work and memory of each gradient method, in theory and counted.

The theory follows H. Zhang, W. Zhao: A memory-efficient neural ordinary differential equation framework based on
high-level adjoint differentiation, IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298: for Nb blocks of Nt steps with
Ns evaluations of a right-hand side of Nl layers. The counts are taken on a chain of such blocks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from pnode_dist.bench.methods.gradient_methods import GRADIENT_METHODS, GradientMethod, recomputed_steps
from pnode_dist.bench.report import Row
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.system.torch_internals import backward_pass_number, storage_pointer

_WIDTH, _SAMPLES = 3, 2


@dataclass(frozen=True)
class Sizes:
    """Number of blocks, steps per block, evaluations of f per step, and layers of f."""

    blocks: int
    steps: int
    stages: int
    layers: int

    def value(self, formula: str) -> int:
        """Return the value of a product such as `Nb (Nt-1) Ns`."""
        factors = {
            "Nb": self.blocks,
            "Nt": self.steps,
            "(Nt-1)": self.steps - 1,
            "(Nt-2)": self.steps - 2,
            "Ns": self.stages,
            "Nl": self.layers,
            "0": 0,
        }
        return math.prod(factors[factor] for factor in formula.split())


@dataclass(frozen=True)
class Formulas:
    """Theory of one gradient method, as products.

    `depth`: layers of f in one backward pass of autograd. `recorded`: layers of f with simultaneous tapes, at most.
    `states`: states stored for the backward pass besides tapes and the blocks' own inputs and outputs. `forward` and
    `backward`: evaluations of f. `products`: vector-Jacobian products of f. `again`: recomputed steps.
    """

    depth: str
    recorded: str
    states: str
    forward: str
    backward: str
    products: str
    again: str


_ALL = "Nb Nt Ns"
THEORY = {
    "NODE-cont": Formulas("Nl", "Nl", "0", _ALL, _ALL, _ALL, "0"),
    "NODE-naive": Formulas("Nb Nt Ns Nl", "Nb Nt Ns Nl", "0", _ALL, "0", _ALL, "0"),
    "ANODE": Formulas("Nt Ns Nl", "Nt Ns Nl", "0", _ALL, _ALL, _ALL, "Nb Nt"),
    "ACA": Formulas("Ns Nl", "Ns Nl", "Nb (Nt-1)", _ALL, _ALL, _ALL, "Nb Nt"),
    # A recomputed step is recorded on a tape. The last step of each block is recorded in the forward pass and not
    # recomputed. The first begins at the block's own input, which is no stored state; the paper stores it: Nb (Nt-1).
    "solution": Formulas("Ns Nl", "Nb Ns Nl", "Nb (Nt-2)", _ALL, "Nb (Nt-1) Ns", _ALL, "Nb (Nt-1)"),
    # The paper's method. Its code also stores u_n, which equals the first stage: Nb (Nt-1) (Ns+1), without the last
    # step.
    "stages": Formulas("Nl", "Nl", "Nb Nt Ns", _ALL, _ALL, _ALL, "0"),
    # Up to eight steps share one tape.
    "graph": Formulas("Nt Ns Nl", "Nb Nt Ns Nl", "0", _ALL, "0", _ALL, "0"),
}
"""Formulas by the names of `GRADIENT_METHODS`."""

QUANTITIES = tuple(field.name for field in fields(Formulas))


class Tally:
    """Counters of a loss and its gradient."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset all counters."""
        self.evaluations: Counter[str] = Counter()
        self.phase = "forward"
        self.is_in_f = False
        # Marked layers: the number in each backward pass of autograd, and the number with a tape.
        self.reversed_by: Counter[int] = Counter()
        self.recorded = self.most_recorded = 0

    def differentiate(self, loss: torch.Tensor) -> None:
        """Run the backward pass of `loss`."""
        self.phase = "backward"
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self.phase = "forward"


class Counted(nn.Module):
    """f with counted evaluations."""

    def __init__(self, func: nn.Module, tally: Tally) -> None:
        super().__init__()
        self.func, self._tally = func, tally

    def forward(self, t: torch.Tensor, u: Any) -> Any:
        """f(t, u)."""
        tally = self._tally
        tally.evaluations[tally.phase] += 1
        tally.is_in_f = True
        try:
            return self.func(t, u)
        finally:
            tally.is_in_f = False


class _Recorded:
    """Token that lives as long as the tape of a layer."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        tally.recorded += 1
        tally.most_recorded = max(tally.most_recorded, tally.recorded)

    def __del__(self) -> None:
        self._tally.recorded -= 1


class _Mark(torch.autograd.Function):
    """Identity that counts the creation, the backward pass and the release of its tape."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tally: Tally) -> torch.Tensor:
        ctx.tally, ctx.recorded = tally, _Recorded(tally)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        ctx.tally.reversed_by[backward_pass_number()] += 1
        return cotangents[0], None


class _Layers(nn.Module):
    """f of `layers` marked layers."""

    def __init__(self, layers: int, tally: Tally) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH, dtype=torch.float64) for _ in range(layers))
        self._tally = tally

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        for layer in self.layers:
            u = torch.tanh(layer(u))
            if u.requires_grad:
                u = _Mark.apply(u, self._tally)  # type: ignore[no-untyped-call]
        return u


def count(gradient_method: GradientMethod, method: str, sizes: Sizes) -> dict[str, int]:
    """Count each of the `QUANTITIES` in one loss and gradient of a chain of blocks."""
    torch.manual_seed(0)
    tally = Tally()
    blocks = [
        gradient_method.block(Counted(_Layers(sizes.layers, tally), tally), method, sizes.steps)
        for _ in range(sizes.blocks)
    ]
    u = torch.randn(_SAMPLES, _WIDTH, dtype=torch.float64, requires_grad=True)
    # The first solve also measures the memory of a recorded step.
    for block in blocks:
        block(u).sum().backward()
    tally.reset()
    known: set[int] = set()
    state: torch.Tensor = u
    with _kept_states(tally, state) as kept:
        for block in blocks:
            known.add(storage_pointer(state.untyped_storage()))
            state = block(state)
        known.add(storage_pointer(state.untyped_storage()))
    tally.differentiate(state.sum())
    solves = [module.last_solve for block in blocks for module in block.modules() if isinstance(module, NeuralODE)]
    size = u.numel() * u.element_size()
    stored = sum(solve.checkpoint_bytes_peak for solve in solves) // size
    if gradient_method.name == "stages":
        stored += sum(solve.graph_bytes for solve in solves) // size
    return {
        "depth": max(tally.reversed_by.values()),
        "recorded": tally.most_recorded,
        "states": stored + sum(entries for storage, entries in kept.items() if storage not in known) // u.numel(),
        "forward": tally.evaluations["forward"],
        "backward": tally.evaluations["backward"],
        "products": tally.reversed_by.total() // sizes.layers,
        "again": sum(map(recomputed_steps, blocks)),
    }


@contextmanager
def _kept_states(tally: Tally, like: torch.Tensor) -> Iterator[dict[int, int]]:
    """Collect the entries of states saved for the backward pass outside of f, by storage. The storages stay alive."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not tally.is_in_f and tensor.shape[-like.dim() :] == like.shape:
            kept[storage_pointer(tensor.untyped_storage())] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def compare(method: str, sizes: Sizes) -> tuple[list[Row], int]:
    """Return rows of the theory beside the counts, and the number of differing entries."""
    rows: list[Row] = []
    wrong = 0
    for name, formulas in THEORY.items():
        found = count(GRADIENT_METHODS[name], method, sizes)
        row: Row = {"method": name}
        for quantity in QUANTITIES:
            formula: str = getattr(formulas, quantity)
            wrong += sizes.value(formula) != found[quantity]
            row[quantity] = (
                f"{formula} = {sizes.value(formula)}, {found[quantity]}" if formula != "0" else str(found[quantity])
            )
        rows.append(row)
    return rows, wrong
