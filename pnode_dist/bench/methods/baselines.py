"""Baseline gradient methods of neural ODEs, implemented directly on torch and torchdiffeq.

Each is a block u(0) -> u(1) of `steps` equal steps of an explicit Runge-Kutta method. The tables here are independent
of PETSc's. The state is a tensor or a tuple of tensors.

- `Naive`: back-propagation through all steps.
- `Anode`: one checkpoint for the block; all of its steps are recomputed (Gholami, Keutzer & Biros, IJCAI 2019).
- `Aca`: a checkpoint for every step, which is recomputed alone (Zhuang et al., ICML 2020).
- `Continuous`: the adjoint equation, solved backward in time together with the state by torchdiffeq (Chen et al.,
  NeurIPS 2018). Its gradient is not that of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pnode_dist.errors import ConfigurationError

State = torch.Tensor | tuple[torch.Tensor, ...]
_Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Table:
    """Explicit Runge-Kutta method with fixed steps: `a` below the diagonal, weights `b`, times `c`.

    Omits a last stage of zero weight that serves only an error estimate.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @property
    def stages(self) -> int:
        """Number of evaluations of f in a step."""
        return len(self.b)


TABLES = {
    "euler": Table(((),), (1.0,), (0.0,)),
    "midpoint": Table(((), (1 / 2,)), (0.0, 1.0), (0.0, 1 / 2)),
    # Bogacki & Shampine, Appl. Math. Lett. 2 (1989)
    "bosh3": Table(((), (1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9), (0.0, 1 / 2, 3 / 4)),
    "rk4": Table(((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 1 / 2, 1 / 2, 1.0)),
    # Dormand & Prince, J. Comput. Appl. Math. 6 (1980)
    "dopri5": Table(
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    ),
}
"""Methods of the PNODE paper's experiments, by their names in `pnode_dist`."""


def runge_kutta_step(func: nn.Module, table: Table, time: float, size: float, state: _Parts) -> _Parts:
    """Take one step of `size` from `state`. Autograd saves nothing beyond the tapes of `func`."""
    slopes: list[_Parts] = []
    for row, node in zip(table.a, table.c, strict=True):
        stage = _combined(state, size, row, slopes)
        when = torch.scalar_tensor(time + node * size, dtype=stage[0].dtype)
        slopes.append(_parts(func(when, _state(stage))))
    return _combined(state, size, table.b, slopes)


def _combined(state: _Parts, size: float, weights: Sequence[float], slopes: Sequence[_Parts]) -> _Parts:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            state = tuple(torch.add(u, k, alpha=size * weight) for u, k in zip(state, slope, strict=True))
    return state


def _parts(state: State) -> _Parts:
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def _state(parts: _Parts) -> State:
    return parts[0] if len(parts) == 1 else parts


class Naive(nn.Module):
    """Back-propagation through all steps. Keeps every tape of f.

    `steps_again` counts the steps of the last call that were recomputed so far.
    """

    def __init__(self, func: nn.Module, method: str, steps: int) -> None:
        super().__init__()
        self.func, self.table, self.steps = func, TABLES[method], steps
        self.steps_again = 0

    def forward(self, state: State) -> State:
        """Return the state after all steps."""
        parts = self.run(_parts(state))
        self.steps_again = 0
        return _state(parts)

    def run(self, state: _Parts) -> _Parts:
        """Take all steps, with the storage that the gradient method requires."""
        return self.stepped(0, self.steps, state)

    def stepped(self, first: int, last: int, state: _Parts) -> _Parts:
        """Return the state after the steps `first` to `last` - 1."""
        size = 1 / self.steps
        for step in range(first, last):
            state = runge_kutta_step(self.func, self.table, step * size, size, state)
            self.steps_again += 1
        return state


class Anode(Naive):
    """One checkpoint for the block. The backward pass recomputes all of its steps with their tapes."""

    def run(self, state: _Parts) -> _Parts:
        """See `Naive.run`."""
        return self.checkpointed(0, self.steps, state)

    def checkpointed(self, first: int, last: int, state: _Parts) -> _Parts:
        """As `stepped`, but store only the state before these steps."""

        def run(*parts: torch.Tensor) -> _Parts:
            return self.stepped(first, last, parts)

        # As in the published codes, the backward pass uses only the tape of recomputed steps. f draws no random
        # numbers.
        found: _Parts = checkpoint(run, *state, use_reentrant=True, preserve_rng_state=False)
        return found


class Aca(Anode):
    """A checkpoint for every step. The backward pass recomputes one step at a time with its tape."""

    def run(self, state: _Parts) -> _Parts:
        """See `Naive.run`."""
        for step in range(self.steps):
            state = self.checkpointed(step, step + 1, state)
        return state


class Continuous(nn.Module):
    """torchdiffeq's `odeint_adjoint`. Solves state and adjoint backward from the end and stores no state in between.

    Raises `ConfigurationError` if torchdiffeq is not installed.
    """

    def __init__(self, func: nn.Module, method: str, steps: int) -> None:
        super().__init__()
        self.func, self.steps = func, steps
        self._solve, self._method = _torchdiffeq(method)

    def forward(self, state: State) -> State:
        """Return the state at time 1."""
        times = torch.tensor([0.0, 1.0], dtype=_parts(state)[0].dtype)
        options = {"step_size": 1 / self.steps}
        found = self._solve(self.func, state, times, method=self._method, options=options)
        return _state(tuple(part[-1] for part in _parts(found)))


@cache
def _torchdiffeq(method: str) -> tuple[Any, str]:
    """Return `odeint_adjoint` and its name of the method, which is registered in torchdiffeq's table here."""
    try:
        from torchdiffeq import odeint_adjoint
        from torchdiffeq._impl.odeint import SOLVERS
        from torchdiffeq._impl.solvers import FixedGridODESolver
    except ImportError:
        raise ConfigurationError("the continuous adjoint is torchdiffeq's, which is not installed") from None
    table = TABLES[method]

    class FixedSteps(FixedGridODESolver):  # type: ignore[misc]
        order = 1  # asked of solvers by name alone

        def _step_func(
            self, func: Any, start: torch.Tensor, size: torch.Tensor, end: torch.Tensor, state: torch.Tensor
        ) -> tuple[torch.Tensor, None]:
            (after,) = runge_kutta_step(func, table, start.item(), size.item(), (state,))
            return after - state, None

    name = f"fixed {method}"
    SOLVERS[name] = FixedSteps
    return odeint_adjoint, name
