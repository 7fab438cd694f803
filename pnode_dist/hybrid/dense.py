"""Dense output: a solve whose state can be evaluated at any time, afterwards and differentiably.

The solve returns the states at the ends of all steps as outputs. Inside a step the state is that of one shorter step of
the same method from the state before. This interpolant has the order of the method, is continuous, and exists for every
method. The cubic of Hermite through the states and slopes of both ends is cheaper and of order three.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Unpack

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.hybrid.times import times_of
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.call_agreement import preparation
from pnode_dist.ode.complex_state import RealCall, real_call
from pnode_dist.ode.differentiable_solve import differentiable_solve
from pnode_dist.ode.given_options import without_adaptation
from pnode_dist.ode.jumps import checked_jumps
from pnode_dist.ode.kept_solvers import KeptSolvers, NoSolvers
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.settings import (
    CallSettings,
    SolverKeywords,
    SolverSettings,
    Times,
    merged,
    refuse_other_outputs,
    without_control,
)
from pnode_dist.ode.solver import communicator
from pnode_dist.ode.time_grid import TimeGrid, check_step_size, divided
from pnode_dist.ode.time_rounding import rounding_of

INTERPOLANTS = ("step", "hermite")
Parts = tuple[torch.Tensor, ...]


def solve_dense(
    func: Function,
    u0: State,
    t_span: Times,
    settings: SolverSettings | None = None,
    *,
    args: tuple[Any, ...] = (),
    interpolant: str = "step",
    **keywords: Unpack[SolverKeywords],
) -> DenseSolution:
    """Solve M du/dt = func(t, u, *args) from u(t_span[0]) = u0 to t_span[1], for evaluation at any time between them.

    Collective on the partition's communicator, and so is each evaluation. `func`, `u0`, `args` and the keywords are
    those of `odeint`. Holds the states of all steps. With error control it solves twice: the first time without
    gradients, to find the steps. `interpolant` is "step" (one step of the method for each time, of its order) or
    "hermite" (a cubic, two evaluations of func for each step that has times inside).

    Raises like `odeint`, and `ConfigurationError` for another `interpolant` or `t_span`, for `last_only`, and for
    "hermite" with a mass matrix.
    """
    asked = CallSettings(**vars(merged(settings, keywords, "solve_dense")))
    with preparation(communicator(asked.partition)) as preparing:
        span = _checked(asked, t_span, interpolant)
        call = real_call(func, u0, asked)
        preparing.later()
    solvers, tangents = KeptSolvers(), KeptSolvers()
    grid, one_step = _steps(call, t_span, span, args)
    times = _step_times(grid, span)
    every = replace(grid, outputs={number: number for number in range(grid.steps + 1)})
    states = differentiable_solve(
        NoSolvers(), NoSolvers(), call.func, call.u0, times, replace(one_step, grid=every), args
    )[0]
    return DenseSolution(
        times, grid, interpolant, call, states, args, replace(one_step, save="last"), solvers, tangents
    )


def _checked(asked: CallSettings, t_span: Times, interpolant: str) -> torch.Tensor:
    """Return the span as a tensor `[2]`. Raises `ConfigurationError`."""
    if interpolant not in INTERPOLANTS:
        raise ConfigurationError(f"interpolant = {interpolant!r}: must be one of {', '.join(INTERPOLANTS)}")
    if interpolant == "hermite" and asked.mass is not None:
        raise ConfigurationError("interpolant = 'hermite': needs du/dt, which a mass matrix hides: must be 'step'")
    refuse_other_outputs(asked, "a dense solution")
    span = times_of("t_span", t_span)
    if span.shape != (2,) or span[0].item() == span[1].item():
        raise ConfigurationError(f"t_span = {span.tolist()}: must be two different times")
    check_step_size(asked.step_size)
    return span


def _steps(call: RealCall, t_span: Times, span: torch.Tensor, args: tuple[Any, ...]) -> tuple[TimeGrid, CallSettings]:
    """Return the steps of the solve, and its settings for given steps. Collective."""
    settings, ends = call.settings, tuple(span.tolist())
    if settings.control() is None:
        grid = divided(ends, settings.step_size, rounding_of(t_span, ends), checked_jumps(settings.jumps))
        return grid, replace(settings, jumps=None)
    with torch.no_grad():
        found = replace(settings, save="last")
        solve = differentiable_solve(NoSolvers(), NoSolvers(), call.func, call.u0, ends, found, args)[1]
    assert solve.grid is not None
    name, options = solve.solver.stepper.method.name, without_adaptation(settings.options)
    return solve.grid, replace(without_control(settings), jumps=None, method=name, options=options)


def _step_times(grid: TimeGrid, span: torch.Tensor) -> torch.Tensor:
    """Return the ends of all steps `[steps + 1]`. Each is a fixed share of its interval between ends and jumps."""
    first, last = span
    knots = {number: torch.tensor(time, dtype=torch.float64) for number, time in grid.jumps.items()}
    knots |= {0: first, grid.steps: last}
    pieces = [first.reshape(1)]
    for begin, end in pairwise(sorted(knots)):
        start, length = knots[begin], knots[end] - knots[begin]
        inside = torch.tensor(grid.starts[begin + 1 : end], dtype=torch.float64)
        shares = (inside - start.detach()) / length.detach()
        # The numbers of the grid themselves: the sum could differ in the last bit.
        moved = start + shares * length
        pieces += [inside + (moved - moved.detach()), knots[end].reshape(1)]
    return torch.cat(pieces)


@dataclass(frozen=True, eq=False)
class DenseSolution:
    """The solution of `solve_dense`, a function of time: `solution(t)`.

    `times` `[steps + 1]` are the ends of the steps. The other fields are for the evaluation.
    """

    times: torch.Tensor
    _grid: TimeGrid = field(repr=False)
    interpolant: str
    _call: RealCall = field(repr=False)
    _states: State = field(repr=False)
    _args: tuple[Any, ...] = field(repr=False)
    _one_step: CallSettings = field(repr=False)
    _solvers: KeptSolvers = field(repr=False)
    _tangent_solvers: KeptSolvers = field(repr=False)

    @property
    def t0(self) -> float:
        """The first time."""
        return self.times[0].item()

    @property
    def t1(self) -> float:
        """The last time."""
        return self.times[-1].item()

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self._grid.steps

    @property
    def states(self) -> State:
        """The states at `times`, `[steps + 1, *u0.shape]`, or a tuple of such."""
        states: State = self._call.outputs(self._states)
        return states

    @outside_graphs
    def __call__(self, t: Any) -> State:
        """Return the states at the times `t`: `[len(t), *u0.shape]` in the order of `t`, or `u0.shape` for one time.

        Differentiable in u0, in func's parameters, in t_span and in `t`. Collective on the partition's communicator:
        all ranks ask for the same times. Raises `ConfigurationError` for a time outside of the span.
        """
        with preparation(communicator(self._one_step.partition)) as preparing:
            times = times_of("t", t)
            self._check(times)
            preparing.later()
        evaluate = self._hermite if self.interpolant == "hermite" else self._stepped
        numbers = self._steps_of(times.detach().reshape(-1))
        found = evaluate(times.reshape(-1), numbers)
        shaped = tuple(part.reshape(*times.shape, *part.shape[1:]) for part in found)
        states: State = self._call.outputs(self._as_state(shaped))
        return states

    def _check(self, times: torch.Tensor) -> None:
        if times.dim() > 1:
            raise ConfigurationError(f"t: shape {tuple(times.shape)}: must be one time or a sequence of times")
        low, high = sorted((self.t0, self.t1))
        for time in times.detach().reshape(-1).tolist():
            if not low <= time <= high:
                raise ConfigurationError(
                    f"t = {time:.17g}: must be between {low:.17g} and {high:.17g}, the solved span"
                )

    def _steps_of(self, times: torch.Tensor) -> list[int]:
        """Return the number of the step that contains each time, the earlier one at a common end."""
        ends, sign = self.times.detach(), 1.0 if self.t1 > self.t0 else -1.0
        numbers = torch.searchsorted(sign * ends, sign * times) - 1
        return numbers.clamp(min=0).tolist()

    def _as_state(self, parts: Parts) -> State:
        return parts if isinstance(self._states, tuple) else parts[0]

    def _parts(self, number: int) -> Parts:
        """Return the state before step `number`, part by part."""
        states = self._states if isinstance(self._states, tuple) else (self._states,)
        return tuple(part[number] for part in states)

    def _stepped(self, times: torch.Tensor, numbers: list[int]) -> list[torch.Tensor]:
        if not numbers:
            return [part.new_zeros(0, *part.shape) for part in self._parts(0)]
        found = [self._after_step(number, time) for number, time in zip(numbers, times, strict=True)]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _after_step(self, number: int, time: torch.Tensor) -> Parts:
        """Return the state at `time`, by one step from the beginning of step `number`. Collective."""
        begin, end = self.times[number], self.times[number + 1]
        moves = (time.requires_grad or begin.requires_grad or end.requires_grad) and torch.is_grad_enabled()
        size = time.item() - begin.item()
        if size == 0.0 and moves:
            # No method takes a step of size 0: this is its limit.
            slopes = self._slopes(number, number)
            return tuple(
                part + (time - begin).to(part.device, part.dtype) * slope
                for part, slope in zip(self._parts(number), slopes, strict=True)
            )
        if size == 0.0 or (time.item() == end.item() and not moves):
            return self._parts(number if size == 0.0 else number + 1)
        jumps = {0: self._grid.jumps[number]} if number in self._grid.jumps else {}
        if number + 1 in self._grid.jumps and time.item() == end.item():
            jumps[1] = end.item()
        grid = TimeGrid((begin.item(),), (size,), {0: 0, 1: 1}, jumps)
        settings = replace(self._one_step, grid=grid)
        state, ends = self._as_state(self._parts(number)), torch.stack([begin, time])
        after = differentiable_solve(
            self._solvers, self._tangent_solvers, self._call.func, state, ends, settings, self._args
        )[0]
        return after if isinstance(after, tuple) else (after,)

    def _slopes(self, step: int, end: int) -> Parts:
        """Return du/dt of step `step` at its end with the number `end`, `step` or `step + 1`. Collective if func is."""
        parts = self._parts(end)
        time = self.times[end].to(parts[0].device, parts[0].dtype)
        interval = self._grid.smooth_interval(step)
        time = time if interval is None else interval.inside(time)
        slopes = self._call.func(time, self._as_state(parts), *self._args)
        return tuple(slopes) if isinstance(self._states, tuple) else (slopes,)

    def _hermite(self, times: torch.Tensor, numbers: list[int]) -> list[torch.Tensor]:
        ends: dict[int, tuple[Parts, Parts]] = {}
        # In the order of the steps, because func may be collective.
        for number in sorted(set(numbers)):
            ends[number] = self._slopes(number, number), self._slopes(number, number + 1)
        rows: list[Parts] = []
        for number, time in zip(numbers, times, strict=True):
            begin, h = self.times[number], self.times[number + 1] - self.times[number]
            share = (time - begin) / h
            rows.append(
                tuple(
                    _cubic(share.to(before.device, before.dtype), h.to(before.device, before.dtype), *values)
                    for before, *values in zip(
                        self._parts(number), self._parts(number), self._parts(number + 1), *ends[number], strict=True
                    )
                )
            )
        if not rows:
            return [part.new_zeros(0, *part.shape) for part in self._parts(0)]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _cubic(
    s: torch.Tensor, h: torch.Tensor, before: torch.Tensor, after: torch.Tensor, first: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Return Hermite's cubic at the share `s` of a step of size `h`, from states and slopes at both ends."""
    rest = 1 - s
    return rest * rest * (1 + 2 * s) * before + s * s * (3 - 2 * s) * after + h * s * rest * (rest * first - s * last)
