"""The interface of a stepper: a segment forward, with or without a tape, and its adjoint.

The caller decides which steps are taken. A step depends on (t, h, u) alone, not on earlier steps, so a recomputed step
has the same bits as the first one.

H. Zhang, E. M. Constantinescu, B. F. Smith: PETSc TSAdjoint: a discrete adjoint ODE solver for first-order and
second-order sensitivity analysis, SIAM J. Sci. Comput. 44 (2022).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.current_state import CurrentState
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.petsc import calls, unwinding

PetscOptions = Mapping[str, Any]
END_OF_TIME = 1e300
MOST_STEPS = 2**31 - 1


@contextmanager
def options_database(options: PetscOptions, unread: set[str] | None = None) -> Iterator[None]:
    """Set `options` in PETSc's options database within the context. Remove those that PETSc reads from `unread`."""
    database = PETSc.Options()
    known = database.getAll().keys() if unread else ()
    before = {name: database.getString(name) for name in options if database.hasName(name)}
    for name, value in options.items():
        if unread and name in before:
            # Deleting the option also deletes the mark that it was read earlier.
            database.delValue(name)
        database.setValue(name, value)
    try:
        yield
    finally:
        if unread:
            unread -= {name for name in unread if calls.option_was_read(name.removeprefix("-"))}
            # PETSc replaces a deprecated name by the new one.
            renamed = {name for name in unread if not database.hasName(name)}
            unread -= renamed
            for name in database.getAll().keys() - known - {name.removeprefix("-") for name in options}:
                if renamed:
                    database.delValue(name)
        for name in options:
            if name in before:
                database.setValue(name, before[name])
            else:
                database.delValue(name)


class Callbacks(Protocol):
    """The callbacks that PETSc calls during a step. `error` is the exception that the right-hand side raised."""

    bound: BoundFunction | None
    error: BaseException | None

    def end_step(self) -> None:
        """Free the data of the step or adjoint step that has ended."""
        ...


class Stepper(ABC):
    """A stepper for one layout of the state, one method and one set of parameter sizes. Collective on `comm`.

    `current` is the current state. `stepping` is True during a step. `failed` is True after a step that ended with an
    error; the stepper cannot be used again. `monitored`: the options ask for PETSc's monitors. With `fingerprints` each
    step sets `fingerprint` to that of its result, even if the result is not formed.
    """

    method: Method
    current: CurrentState
    monitored = False
    fingerprints = False
    fingerprint: float | None = None

    def __init__(self, comm: MPI.Comm, layout: StateLayout) -> None:
        calls.one_blas_thread()
        self.comm, self.layout = comm, layout
        self.failed = self.stepping = False
        self._errors_of_func = ErrorsOfFunc(self)

    @property
    @abstractmethod
    def callbacks(self) -> Callbacks:
        """The callbacks of the stepper's TS."""

    @abstractmethod
    def advance(self, segment: Segment) -> None:
        """Advance the current state over the steps of `segment`. Collective on `comm`.

        A step of negative size goes backward in time. PETSc steps forward only, and then sees du/ds = -f(-s, u),
        s = -t.
        """

    @abstractmethod
    def record(self, segment: Segment, level: str) -> Tape:
        """Advance over the steps of `segment`, and return their tape. Collective on `comm`.

        At the `level` "graph" the tape is torch's graph of the steps or of each stage, at "stages" the states of the
        stages.
        """

    @abstractmethod
    def pull_back(self, segment: Segment, tape: Tape) -> list[tuple[float, float]]:
        """Take adjoint and gradient back over the steps of `segment`, given their tape. Collective on `comm`.

        Returns h dL/dh and dL/dt_n of each step; nothing if the gradient with respect to times is not needed.
        """

    @abstractmethod
    def start_adjoint(self) -> None:
        """Begin a backward pass with a zero adjoint and a zero gradient with respect to the parameters."""

    @abstractmethod
    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """Add to the adjoint of the state, part by part; None is zero. `parts` are never written to."""

    @abstractmethod
    def change_adjoint(self, change: Callable[[Sequence[torch.Tensor]], Parts]) -> None:
        """Replace the adjoint of the state by the parts that `change` returns for it. Collective if `change` is."""

    @abstractmethod
    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """End the backward pass. Returns the adjoint, and the gradient with respect to the parameters of `shapes`.

        Both are read-only.
        """

    @abstractmethod
    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """Return f at `time` and the current state, flat. `direction` is the sign of the steps. Collective."""

    def bind(self, bound: BoundFunction) -> None:
        """Use this right-hand side from now on."""
        self.callbacks.bound = bound

    def maps(self, segment: Segment) -> bool:
        """Return True if the steps of `segment` are taken with the map between steps, without being asked to."""
        return False

    def _store_fingerprint(self, parts: Parts) -> None:
        """Set `fingerprint` to that of a step's result."""
        if self.fingerprints:
            self.fingerprint = fingerprint(parts)

    def errors_of_func(self) -> ErrorsOfFunc:
        """Return the context of PETSc's calls, which raises the exception of func instead of PETSc's error code."""
        return self._errors_of_func

    @abstractmethod
    def destroy(self) -> None:
        """Destroy every PETSc object of this stepper. It cannot be used again. Collective on `comm`."""

    @property
    @abstractmethod
    def _petsc(self) -> PETSc.TS:
        """The TS that runs the monitors."""

    @abstractmethod
    def _solution(self) -> PETSc.Vec:
        """Return the current state as a read-only Vec."""

    def monitor(self, number: int, time: float, size: float) -> None:
        """Run PETSc's monitors (`-ts_monitor`, ...) on the current state, if there are any. Collective on `comm`."""
        if self.monitored:
            self._petsc.setTimeStep(size)
            self._petsc.monitor(number, time, self._solution())


class SingleStepper(Stepper):
    """A stepper that takes and reverses one step at a time. All of its steps have as many entries on a tape."""

    @abstractmethod
    def step(self, number: int, time: float, size: float, tape: Tape | None = None, level: str = "graph") -> None:
        """Advance the current state from `time` by `size`. Collective on `comm`.

        Append to `tape`, if given, the data of each stage for the adjoint, see `record`.
        """

    @abstractmethod
    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """Take adjoint and gradient back over step `number`, given its tape. Collective on `comm`."""

    @abstractmethod
    def take_time_gradients(self) -> tuple[float, float]:
        """Return the gradient with respect to the last step's size and start, and reset it to zero.

        They are the last two parameters if the gradient with respect to times is needed.
        """

    def advance(self, segment: Segment) -> None:
        """See `Stepper.advance`."""
        for number, (time, size) in enumerate(zip(segment.starts, segment.sizes, strict=True), start=segment.first):
            self.step(number, time, size)

    def record(self, segment: Segment, level: str) -> Tape:
        """See `Stepper.record`."""
        tape: Tape = []
        for number, (time, size) in enumerate(zip(segment.starts, segment.sizes, strict=True), start=segment.first):
            self.step(number, time, size, tape, level)
        return tape

    def pull_back(self, segment: Segment, tape: Tape) -> list[tuple[float, float]]:
        """See `Stepper.pull_back`."""
        bound, steps = self.callbacks.bound, len(segment)
        entries, found = len(tape) // steps, []
        assert entries * steps == len(tape)
        for number in reversed(range(steps)):
            own = tape[number * entries :]
            del tape[number * entries :]
            self.adjoint_step(segment.first + number, segment.starts[number], segment.sizes[number], own)
            if bound is not None and bound.needs_time_gradient:
                found.append(self.take_time_gradients())
        return found[::-1]


class ErrorsOfFunc:
    """The context of PETSc's calls in a step. A class, because a generator context takes five times as long."""

    def __init__(self, stepper: Stepper) -> None:
        # Weak, because the stepper holds this object.
        self._stepper = weakref.ref(stepper)

    def __enter__(self) -> None:
        self._of().stepping = True

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, trace: Any) -> None:
        unwinding.end()
        stepper = self._of()
        callbacks = stepper.callbacks
        error, callbacks.error = callbacks.error, None
        stepper.stepping = False
        callbacks.end_step()
        if raised is not None:
            # PETSc does not unwind: its Vecs stay locked, and the TS cannot be used again.
            stepper.failed = True
            if error is not None:
                raise error from None

    def _of(self) -> Stepper:
        stepper = self._stepper()
        assert stepper is not None
        return stepper


@contextmanager
def refused_options() -> Iterator[None]:
    """Raise `ConfigurationError` for options that PETSc refuses within the context."""
    try:
        yield
    except PETSc.Error as error:
        reason = str(error).strip().splitlines()[-1].partition("] ")[2]
        raise ConfigurationError(f"petsc options: {reason}") from None


def set_from_options(ts: PETSc.TS, options: PetscOptions, unread: set[str]) -> bool:
    """Set up `ts` from PETSc's options, without step-size control. Returns True if they ask for monitors.

    Removes the options that PETSc reads from `unread`. Raises `ConfigurationError` for options that PETSc refuses.
    """
    # petsc4py has no TSAdapt object: the options database is the way to turn step control off.
    with options_database({**options, "ts_adapt_type": "none"}, unread):
        with refused_options():
            ts.setFromOptions()
        return any(name.startswith("ts_monitor") for name in PETSc.Options().getAll())


def set_up_adjoint(ts: PETSc.TS) -> None:
    """Set up the adjoint of `ts`, whose cost gradients are set."""
    # Only this set-up requires a TSTrajectory. Later it would create a directory on disk.
    ts.setSaveTrajectory()
    ts.adjointSetUp()
    ts.removeTrajectory()
