"""Measuring what a solve's parts take: bytes of a recorded step, seconds of steps, adjoints and checkpoints.

The probe runs the first step of the problem at hand a few times. It counts in no statistics.
"""

from __future__ import annotations

import math
import statistics
import time as clock
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.ode.evaluation import Problem, Recording, StageGraph, StageState
from pnode_dist.ode.stepper import Stepper
from pnode_dist.trajectory.costs import Costs, LevelCosts
from pnode_dist.trajectory.schedule import Tier
from pnode_dist.trajectory.store import SlotPool, SpillError

_REPEATS = 5
_LONG_ENOUGH, _LONG = 0.15, 1.0
_LEVELS = ("graph", "stages")
_NEVER = 1e9
_MOST_STEPS_BETWEEN = 20


def record_measured(stepper: Stepper, problem: Problem, time: float, size: float, level: str) -> tuple[Recording, int]:
    """Run the step from the current state recorded, and measure the memory of the recording on the fullest rank.

    Collective on the stepper's communicator.
    """
    recording: Recording = []
    with _saved_bytes(problem.constants) as saved:
        stepper.step(0, time, size, recording, isolate=True, level=level)
    for stage in recording:
        held = (*stage.inputs, *stage.outputs) if isinstance(stage, StageGraph) else ()
        held = stage.inputs if isinstance(stage, StageState) else held
        saved.update((_storage(tensor), tensor.untyped_storage().nbytes()) for tensor in held)
    return recording, stepper.comm.allreduce(sum(saved.values()), MPI.MAX)


def probe(
    stepper: Stepper,
    problem: Problem,
    initial: tuple[torch.Tensor, ...],
    time: float,
    size: float,
    pools: dict[Tier, SlotPool],
) -> Costs:
    """Measure the step from `initial` at `time` by `size`, and checkpoints in `pools`, on all ranks.

    The slot on disk has been written before it is timed. Leaves the initial state in the stepper and zero in its
    adjoint. Collective on the stepper's communicator.
    """
    counts = problem.counts()
    held: dict[str, int] = {}
    for level in _LEVELS:
        stepper.set_state(initial)
        recording, held[level] = record_measured(stepper, problem, time, size, level)
        stepper.adjoint.fill_(1.0)
        stepper.touched()
        stepper.adjoint_step(0, time, size, recording)
    steps: list[float] = []
    records: dict[str, list[float]] = {level: [] for level in _LEVELS}
    adjoints: dict[str, list[float]] = {level: [] for level in _LEVELS}
    # In turns, so that a slow moment of the machine hits all of them alike.
    for _ in _enough(stepper.comm):
        stepper.set_state(initial)
        steps.append(_seconds(partial(stepper.step, 0, time, size)))
        for level in _LEVELS:
            stepper.set_state(initial)
            recording = []
            records[level].append(_seconds(partial(stepper.step, 0, time, size, recording, level=level)))
            adjoints[level].append(_seconds(partial(stepper.adjoint_step, 0, time, size, recording)))
    levels = {level: LevelCosts(held[level], _usual(records[level]), _usual(adjoints[level])) for level in _LEVELS}
    stepper.set_state(initial)
    stepper.adjoint.zero_()
    stepper.parameter_gradient.zero_()
    stepper.touched()
    state = stepper.state_array
    copy = statistics.median(max(pools[Tier.RAM].seconds(state)) for _ in range(_REPEATS))
    write, read, overlapped = 0.0, 0.0, 1.0
    if Tier.DISK in pools:

        def steps_of(count: int) -> None:
            stepper.set_state(initial)
            for _ in range(count):
                stepper.step(0, time, size)

        write, read, overlapped = _disk(stepper, pools[Tier.DISK], _usual(steps), steps_of)
    problem.count_from(counts)
    stepper.set_state(initial)
    return Costs(_usual(steps), copy, write, read, overlapped, levels).agreed(stepper.comm)


def _disk(stepper: Stepper, pool: SlotPool, step: float, steps_of: Callable[[int], None]) -> tuple[float, float, float]:
    """Seconds of writing and of reading a checkpoint, and the share of them that passes beside steps. Collective.

    A disk that fails here fails again where it is used, and is told about there.
    """
    state = stepper.state_array
    write = read = _NEVER
    with suppress(SpillError):
        write, read = pool.seconds(state)
    # Of the slowest rank, so that all take the same steps: f may communicate.
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
    """So many rounds that they take a while, 3 to 50 of them, or 1 where that takes long; as many on every rank."""
    began = clock.perf_counter()
    for repeat in range(50):
        yield
        if comm.allreduce(clock.perf_counter() - began, MPI.MAX) > (_LONG_ENOUGH if repeat >= 2 else _LONG):
            return


def _usual(seconds: list[float]) -> float:
    """The lower quartile: what a measurement takes when nothing comes in between."""
    return sorted(seconds)[len(seconds) // 4]


def _seconds(work: Callable[[], None]) -> float:
    began = clock.perf_counter()
    work()
    return clock.perf_counter() - began


@contextmanager
def _saved_bytes(constants: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Count what autograd saves meanwhile: bytes by storage, those of `constants` left out."""
    known = {_storage(tensor) for tensor in constants}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage not in known:
            saved[storage] = tensor.untyped_storage().nbytes()
        # Not the tensor itself: an operation that saves its own result would then keep itself alive.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _storage(tensor: torch.Tensor) -> int:
    """Which storage a tensor has, also where its address says nothing: on other devices, or for none at all."""
    return int(tensor.untyped_storage()._cdata)
