"""Measure the costs of a solve: the bytes of a step's tape, and the seconds of steps, adjoints and checkpoints.

The probe runs the first step of the solve a few times. It does not count in any statistics.
"""

from __future__ import annotations

import math
import statistics
import time as clock
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.checkpointing.costs import Costs, LevelCosts
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.store import SlotPool, SpillError
from pnode_dist.ode.between_steps import BetweenSteps, reverse, take, take_with_tape
from pnode_dist.ode.rhs.evaluation import BoundFunction, MapTape, StageGraph, StageState
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.base import Stepper
from pnode_dist.ode.steppers.compiled_segment import CompiledTape
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.system.torch_internals import storage_pointer

_Result = TypeVar("_Result")
_REPEATS = 5
_LONG_ENOUGH, _LONG = 0.15, 1.0
_LEVELS = ("graph", "stages")
_NEVER = 1e9
_MOST_STEPS_BETWEEN = 20


def measured_tape(
    stepper: Stepper, bound: BoundFunction, segment: Segment, level: str, between: BetweenSteps | None
) -> tuple[Tape, int]:
    """Take a segment from the current state with a tape, and the map between steps after it.

    Returns the tape, and its bytes on the rank with the largest one. Collective on the stepper's communicator.
    """
    with _saved_tensors() as found:
        tape = take_with_tape(stepper, segment, level, between)
    known = {_storage(tensor) for tensor in bound.constants}
    tensors = [held.tensor for held in (reference() for reference in found) if held is not None]
    saved = {storage: nbytes for storage, nbytes in map(_sized, tensors) if storage not in known}
    for stage in tape:
        held = (*stage.inputs, *stage.values) if isinstance(stage, StageGraph) else ()
        held = stage.inputs if isinstance(stage, StageState) else held
        held = stage.start if isinstance(stage, CompiledTape) else held
        held = stage.inputs if isinstance(stage, MapTape) else held
        saved.update(map(_sized, held))
    return tape, stepper.comm.allreduce(sum(saved.values()), MPI.MAX)


def probe(
    stepper: Stepper,
    bound: BoundFunction,
    initial: tuple[torch.Tensor, ...],
    segment: Segment,
    pools: dict[Tier, SlotPool],
    between: BetweenSteps | None,
) -> Costs:
    """Measure the first segment, from `initial`, and checkpoints in `pools`. The costs are those of a step. Collective.

    `between` is the map between steps, None without one.

    The slot on disk is written once before it is timed. The stepper is left at the initial state.
    """
    counts = bound.counts()
    held: dict[str, int] = {}
    stepper.start_adjoint()
    if between is not None:
        between.start_adjoint()
    for level in _LEVELS:
        stepper.current.set(initial)
        tape, held[level] = measured_tape(stepper, bound, segment, level, between)
        stepper.add_to_adjoint([torch.ones_like(part) for part in stepper.current.parts])
        reverse(stepper, segment, tape, between)
    steps: list[float] = []
    records: dict[str, list[float]] = {level: [] for level in _LEVELS}
    adjoints: dict[str, list[float]] = {level: [] for level in _LEVELS}
    # Interleaved, so that a slow moment of the machine affects all of them alike.
    for _ in _enough(stepper.comm):
        stepper.current.set(initial)
        steps.append(_seconds(partial(take, stepper, segment, between)))
        for level in _LEVELS:
            stepper.current.set(initial)
            seconds, tape = _timed(partial(take_with_tape, stepper, segment, level, between))
            records[level].append(seconds)
            adjoints[level].append(_seconds(partial(reverse, stepper, segment, tape, between)))
    count = len(segment)
    levels = {
        level: LevelCosts(-(-held[level] // count), _usual(records[level]) / count, _usual(adjoints[level]) / count)
        for level in _LEVELS
    }
    stepper.end_adjoint(())
    stepper.current.set(initial)
    state = stepper.current.array
    copy = statistics.median(max(pools[Tier.RAM].seconds(state)) for _ in range(_REPEATS))
    write, read, overlapped = 0.0, 0.0, 1.0
    if Tier.DISK in pools:

        def steps_of(count: int) -> None:
            stepper.current.set(initial)
            for _ in range(count):
                take(stepper, segment, between)

        write, read, overlapped = _disk(stepper, pools[Tier.DISK], _usual(steps), steps_of)
    bound.count_from(counts)
    stepper.current.set(initial)
    return Costs(_usual(steps) / count, copy, write, read, overlapped, levels).agreed(stepper.comm)


def _disk(stepper: Stepper, pool: SlotPool, step: float, steps_of: Callable[[int], None]) -> tuple[float, float, float]:
    """Return the seconds of writing and of reading a checkpoint, and the share of them that overlaps with steps.

    Collective. A failure of the disk is ignored here: it occurs again, and is reported, where the disk is used.
    """
    state = stepper.current.array
    write = read = _NEVER
    with suppress(SpillError):
        write, read = pool.seconds(state)
    # Take the values of the slowest rank: f may communicate, so all ranks must take the same number of steps.
    agreed = np.array([max(write, read), step])
    stepper.comm.Allreduce(MPI.IN_PLACE, agreed, MPI.MAX)
    between = min(max(math.ceil(agreed[0] / agreed[1]), 1), _MOST_STEPS_BETWEEN)
    slot, other = pool.acquire(), state.copy()
    alone, beside = [], []
    for _ in range(_REPEATS if 2 * between * agreed[1] < _LONG_ENOUGH else 1):
        alone.append(_seconds(lambda: steps_of(2 * between)))
        began = clock.perf_counter()
        pool.write(slot, other, 0, 0.0)
        steps_of(between)
        pool.prefetch(slot)
        steps_of(between)
        with suppress(SpillError):
            pool.read(slot, other)
        beside.append(clock.perf_counter() - began)
    pool.release(slot)
    held_up = statistics.median(beside) - statistics.median(alone)
    return write, read, min(max(1 - held_up / (write + read), 0.0), 1.0)


def _enough(comm: MPI.Comm) -> Iterator[None]:
    """Yield for each round of a measurement: 3 to 50 rounds, or 1 if that takes long, as many on every rank."""
    began = clock.perf_counter()
    for repeat in range(50):
        yield
        if comm.allreduce(clock.perf_counter() - began, MPI.MAX) > (_LONG_ENOUGH if repeat >= 2 else _LONG):
            return


def _usual(seconds: list[float]) -> float:
    """Return the lower quartile, which leaves out interruptions."""
    return sorted(seconds)[len(seconds) // 4]


def _seconds(work: Callable[[], object]) -> float:
    return _timed(work)[0]


def _timed(work: Callable[[], _Result]) -> tuple[float, _Result]:
    began = clock.perf_counter()
    result = work()
    return clock.perf_counter() - began, result


class _Saved:
    """A detached copy of a saved tensor. The tensor itself would keep alive an operation that saves its own result."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def unpacked(self) -> torch.Tensor:
        """Return the tensor. Raises `RuntimeError` if it was written to, which torch does not check under hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self.tensor.shape)}, saved by the first step of a solve"
            )
        return self.tensor


@contextmanager
def _saved_tensors() -> Iterator[list[weakref.ref[_Saved]]]:
    """Collect weak references to the tensors that autograd saves within the context."""
    found: list[weakref.ref[_Saved]] = []

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        found.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpacked):
        yield found


def _sized(tensor: torch.Tensor) -> tuple[int, int]:
    """Return an identifier of a tensor's storage, and its bytes."""
    return _storage(tensor), tensor.untyped_storage().nbytes()


def _storage(tensor: torch.Tensor) -> int:
    """Return an identifier of a tensor's storage, also for a storage on a device or without memory."""
    return storage_pointer(tensor.untyped_storage())
