"""A batch of solves with times of their own: one solve in a common, scaled time.

Sample b has the output times t[b, 0], ..., t[b, n - 1]. In the scaled time s the output i of all samples is at s = i,
and between them t[b](s) is linear. The solve integrates du/ds = f(t(s), u) dt/ds, whose right-hand side jumps at the
outputs. The times are inputs of this right-hand side, so their gradient is the exact one of the computed numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.distributed import agreement
from pnode_dist.distributed.agreement import Description
from pnode_dist.errors import ConfigurationError
from pnode_dist.hybrid.times import times_of
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.call_agreement import preparation
from pnode_dist.ode.complex_state import real_call
from pnode_dist.ode.differentiable_solve import differentiable_solve
from pnode_dist.ode.kept_solvers import NoSolvers
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.rhs.wrapped import wrapped
from pnode_dist.ode.settings import CallSettings, SolverKeywords, SolverSettings, merged, refuse_other_outputs
from pnode_dist.ode.solver import communicator
from pnode_dist.ode.time_grid import TimeGrid, check_step_size, divided


@outside_graphs
def odeint_spans(
    func: Function,
    u0: State,
    t: torch.Tensor,
    settings: SolverSettings | None = None,
    *,
    args: tuple[Any, ...] = (),
    **keywords: Unpack[SolverKeywords],
) -> State:
    """Solve du/dt = func(t, u, *args) for a batch of samples, each from `t[b, 0]` to its own output times `t[b]`.

    The first axis of `u0`, or of each part of it, is the batch; `t` is `[batch, n]`, on several ranks that of this
    rank's samples. `func` gets the times of all samples, a tensor `[batch]` in the type of the state, and the state
    `[batch, ...]`. Samples must not depend on one another. Returns `[n, batch, ...]`. Differentiable like `odeint`,
    also in `t`.

    All samples take the same number of steps: as many as the longest one needs for `step_size`, or as error control
    asks for with all of them. It starts anew at each output. A row of `t` increases or decreases; equal times repeat
    the state, so that short rows can be padded. The keywords are those of `odeint`. Collective on the partition's
    communicator.

    Raises like `odeint`, and `ConfigurationError` for other times, for `jumps`, and for a mass matrix that acts on the
    batch.
    """
    asked = CallSettings(**vars(merged(settings, keywords, "odeint_spans")))
    comm = communicator(asked.partition)
    with preparation(comm) as preparing:
        times = _checked(u0, t, asked)
        check_step_size(asked.step_size)
        parts = u0 if isinstance(u0, tuple | list) else (u0,)
        times = times.to(parts[0].device)
        call = real_call(wrapped(func, _scaled), u0, asked)
        preparing.later()
    ends = [float(number) for number in range(times.shape[1])]
    outputs = differentiable_solve(
        NoSolvers(), NoSolvers(), call.func, call.u0, ends, _stepped(call.settings, times, comm), (times, *args)
    )[0]
    states: State = call.outputs(outputs)
    return states


def _checked(u0: State, t: Any, asked: CallSettings) -> torch.Tensor:
    """Return the times in double precision. Raises `ConfigurationError`."""
    times = times_of("t", t)
    parts = u0 if isinstance(u0, tuple | list) else (u0,)
    if not all(isinstance(part, torch.Tensor) and part.dim() > 0 for part in parts):
        raise ConfigurationError("u0: must be tensors whose first axis is the batch")
    if times.dim() != 2 or times.shape[1] == 0 or any(len(part) != len(times) for part in parts):
        batches = ", ".join(str(len(part)) for part in parts)
        raise ConfigurationError(
            f"t: shape {tuple(times.shape)} for a state of {batches} samples: must be [batch, n] with the same batch"
        )
    spans = times.detach().diff(dim=1)
    wrong = ((spans > 0).any(1) & (spans < 0).any(1)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ConfigurationError(f"t[{row}] = {times[row].tolist()}: must increase or decrease")
    if asked.jumps is not None:
        raise ConfigurationError("jumps: samples meet them in different steps: must be None")
    for name in ("first_step", "dt_min", "dt_max"):
        if getattr(asked, name) is not None:
            raise ConfigurationError(f"{name}: samples take steps of different sizes: must be None")
    refuse_other_outputs(replace(asked, last_only=False), "a batch with times of each sample")
    masses = asked.mass if isinstance(asked.mass, tuple | list) else (asked.mass,) * len(parts)
    for mass, part in zip(masses, parts, strict=False):
        if isinstance(mass, PETSc.Mat) or (isinstance(mass, torch.Tensor) and mass.dim() == 2 > part.dim()):
            raise ConfigurationError("mass: must act on each sample alone: a diagonal, or a matrix for the last axis")
    return times


def _stepped(settings: CallSettings, times: torch.Tensor, comm: MPI.Comm) -> CallSettings:
    """Return the settings of the solve in scaled time. Collective."""
    spans = times.detach().diff(dim=1).abs()
    longest = torch.zeros(spans.shape[1], dtype=torch.float64) if not len(spans) else spans.amax(0).cpu()
    if comm.size > 1:
        # Synchronise with a deadline first: the arguments of another rank may be wrong.
        call = f"odeint_spans with {times.shape[1]} times of each sample"
        agreement.of(comm).reduced(
            comm, agreement.digest(call), lambda: Description(call, {}, "", agreement.place_in_program(), None)
        )
        comm.Allreduce(MPI.IN_PLACE, longest.numpy(), MPI.MAX)
    inside = tuple(float(number) for number in range(1, len(longest)))
    if settings.control() is not None:
        first = settings.step_size
        if first is not None and len(longest) and longest[0] > 0:
            first = min(first / longest[0].item(), 1.0)
        return replace(settings, step_size=first, jumps=inside)
    starts: list[float] = []
    sizes: list[float] = []
    outputs = {0: 0}
    for number, length in enumerate(longest.tolist()):
        # The grid of the longest sample decides on the number of steps.
        count = divided((0.0, length), settings.step_size).steps if length > 0 else 1
        starts.extend(number + step / count for step in range(count))
        sizes.extend([1 / count] * count)
        outputs[len(starts)] = number + 1
    jumps = {step: float(output) for step, output in outputs.items() if 0 < output < len(longest)}
    return replace(settings, grid=TimeGrid(tuple(starts), tuple(sizes), outputs, jumps))


def _scaled(func: Function, s: torch.Tensor, u: Any, args: tuple[Any, ...]) -> Any:
    """Return du/ds, given the times of all samples as the first of `args`."""
    times, *others = args
    number = torch.clamp(torch.floor(s.detach()), 0, times.shape[1] - 2).to(torch.int64).reshape(1)
    begin = torch.index_select(times, 1, number).squeeze(1)
    length = torch.index_select(times, 1, number + 1).squeeze(1) - begin
    share = s.to(times.dtype) - number.to(times.dtype)
    part = u[0] if isinstance(u, tuple) else u
    real = part.real.dtype if part.is_complex() else part.dtype
    rates = func((begin + share * length).to(real), u, *others)
    if isinstance(rates, tuple | list):
        return tuple(_times_samples(rate, length) for rate in rates)
    return _times_samples(rates, length)


def _times_samples(rate: Any, length: torch.Tensor) -> Any:
    """Return a rate times the length of each sample's interval; something that is no rate as it is."""
    if not isinstance(rate, torch.Tensor) or rate.dim() == 0 or len(rate) != len(length):
        return rate
    real = rate.real.dtype if rate.is_complex() else rate.dtype
    return rate * length.to(real).reshape((-1, *(1,) * (rate.dim() - 1)))
