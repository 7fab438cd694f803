"""The agreement of all ranks on a solve, and on its backward pass, before they begin.

A solve is collective: all ranks make PETSc's objects together, and every step may communicate. The ranks therefore
compare their arguments before the first collective operation that depends on them. A rank with wrong arguments takes
part too, and its error is raised on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any

from mpi4py import MPI

from pnode_dist.checkpointing import budget
from pnode_dist.distributed import agreement
from pnode_dist.distributed.agreement import Agreement, Description
from pnode_dist.ode.jumps import checked_jumps
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.separable import Separable
from pnode_dist.ode.rhs.split import MatrixFunction, SplitFunction
from pnode_dist.ode.rhs.tangent import WithTangent
from pnode_dist.ode.settings import CallSettings
from pnode_dist.ode.steppers.tolerances import Tolerance
from pnode_dist.partition.protocol import Partition

Facts = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class PartShape:
    """The shape of one part of this rank's state.

    `axes` are the axes before the partitioned ones; None if the last axes are not this rank's part of the partition.
    Two parts are equal if they may belong to one state.
    """

    axes: tuple[int, ...] | None
    dimensions: int
    local: tuple[int, ...] = field(compare=False, repr=False)
    owned: tuple[int, ...] = field(compare=False, repr=False)


@dataclass(frozen=True)
class StateShape:
    """The shapes of a state on this rank. They differ between ranks for an uneven partition."""

    parts: tuple[PartShape, ...]

    def agrees_with(self, others: Sequence[StateShape]) -> bool:
        """Return True if these states of all ranks can be parts of one state."""
        if len({len(other.parts) for other in others}) > 1:
            return False
        rows = list(zip(*(other.parts for other in others), strict=True))
        anchored = any(_spread_alike(row) for row in rows)
        return all(_may_differ(row, anchored) for row in rows)

    def __str__(self) -> str:
        return ", ".join(str(list(part.local)) for part in self.parts)


def _spread_alike(row: Sequence[PartShape]) -> bool:
    """Return True if a part of the state is partitioned on every rank."""
    return row[0].axes is not None and all(part.axes == row[0].axes for part in row)


def _may_differ(row: Sequence[PartShape], anchored: bool) -> bool:
    """Return True if a part may have these shapes on the ranks. `anchored`: another part is partitioned."""
    if _spread_alike(row) or len({part.local for part in row}) == 1:
        return True
    if len({part.dimensions for part in row}) > 1:
        return False
    if all(part.axes is None for part in row) or any(_spread_from(row, axis) for axis in range(row[0].dimensions)):
        return True
    # Beside a partitioned part, a part may have any size, also by chance that of the partition.
    return anchored and any(part.axes is None for part in row)


def _spread_from(row: Sequence[PartShape], axis: int) -> bool:
    """Return True if the axes from `axis` on are partitioned on every rank, and all others are equal."""
    stop = axis + len(row[0].owned)
    others = {(part.local[:axis], part.local[stop:]) for part in row}
    return len(others) == 1 and all(part.local[axis:stop] == part.owned for part in row)


def state_shape(shapes: Sequence[tuple[int, ...]], partition: Partition) -> StateShape:
    """Return the shapes of a state, with its partitioned axes marked."""
    return _state_shape(tuple(shapes), tuple(partition.local_shape))


@lru_cache(maxsize=64)
def _state_shape(shapes: tuple[tuple[int, ...], ...], owned: tuple[int, ...]) -> StateShape:
    parts = []
    for shape in shapes:
        first = len(shape) - len(owned)
        axes = shape[:first] if first >= 0 and shape[first:] == owned else None
        parts.append(PartShape(axes, len(shape), shape, owned))
    return StateShape(tuple(parts))


@dataclass
class Agreed:
    """The agreement of all ranks on a solve: its number on this communicator, and its facts.

    `creates`: some rank makes a new solver, so all do. `bounds` are those of `checkpointing.budget.slot_bounds`. They
    are used once.
    """

    agreement: Agreement
    comm: MPI.Comm
    number: int
    facts: Facts
    creates: bool
    bounds: list[int] | None

    def take_bounds(self) -> list[int] | None:
        """Return the bounds at the first call, None later."""
        bounds, self.bounds = self.bounds, None
        return bounds

    def begin_backward(self, again: bool) -> None:
        """Begin a backward pass of this solve. `again`: not its first one. Collective.

        Raises `DisagreementError` on all ranks if they do not all begin the same pass.
        """
        kind = "another backward pass" if again else "the backward pass"
        self.agreement.reduced(
            self.comm,
            agreement.numbered(agreement.digest(kind), self.number),
            lambda: _described(f"{kind} of solve {self.number}", self.facts),
        )


class Preparation:
    """The preparation of a solve, up to the agreement of the ranks. An error in it is raised on all ranks alike."""

    def __init__(self, comm: MPI.Comm, kind: str) -> None:
        self._comm = comm
        self._agreement = agreement.of(comm)
        self._agreement.begun += 1
        self._number = self._agreement.begun
        self._kind = kind
        self._reached = False

    def agree(self, facts: Facts, creates: bool, bounds: Sequence[int]) -> Agreed:
        """Compare `facts` with those of the other ranks. Collective. Raises `DisagreementError` on all ranks."""
        self._reached = True
        fingerprint = self._numbered(agreement.digest(facts))
        least_creates, *least = self._agreement.reduced(
            self._comm, fingerprint, lambda: _described(self._call(), facts), (-creates, *bounds)
        )
        return Agreed(self._agreement, self._comm, self._number, facts, least_creates < 0, least)

    def later(self) -> None:
        """Defer the comparison to another preparation of the same solve."""
        self._reached = True
        self._agreement.begun -= 1

    def _numbered(self, fingerprint: int) -> int:
        return agreement.numbered(fingerprint ^ agreement.digest(self._kind), self._number)

    def _call(self) -> str:
        return f"{self._kind} {self._number}"

    def __enter__(self) -> Preparation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reached or not isinstance(error, Exception):
            return
        failure = (type(error).__name__, " ".join(str(error).split()))
        self._agreement.reduced(
            self._comm,
            self._numbered(agreement.digest(failure)),
            lambda: _described(self._call(), (), failure),
            failed=True,
        )


class Alone:
    """The preparation of a solve on one rank, without a comparison."""

    def agree(self, facts: Facts, creates: bool, bounds: Sequence[int]) -> None:
        """See `Preparation`."""

    def later(self) -> None:
        """See `Preparation`."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *error: object) -> None:
        pass


_ALONE = Alone()


def preparation(comm: MPI.Comm, kind: str = "solve") -> Preparation | Alone:
    """Return the context for the preparation of a solve on `comm`."""
    return _ALONE if comm.size == 1 else Preparation(comm, kind)


def _described(call: str, facts: Facts, failure: tuple[str, str] | None = None) -> Description:
    found = dict(facts)
    summary = ""
    if "method" in found:
        summary = f"method {found['method']}, {len(found['t'])} times, state {found['state']} {found['dtype']}"
    return Description(call, found, summary.replace("torch.", ""), agreement.place_in_program(), failure)


_OF_STEPS = ("pcoeff", "icoeff", "dcoeff", "first_step", "dt_min", "dt_max", "max_steps")
_OF_BUDGET = ("keep", "schedule", "checkpoint_dtype", "ram_slots", "disk_slots", "on_spill_error")


def facts(
    settings: CallSettings,
    method: Method,
    layout: StateLayout,
    times: tuple[float, ...],
    func: Any,
    needs_gradient: bool,
    needs_time_gradient: bool,
) -> Facts:
    """Return the facts of a solve that ranks compare. Sizes of budgets may differ: the smallest one counts."""
    assert settings.partition is not None
    found: list[tuple[str, Any]] = [
        ("method", method.name),
        ("state", state_shape(layout.shapes, settings.partition)),
        ("dtype", layout.dtype),
        ("compute_dtype", None if layout.compute_dtype == layout.dtype else layout.compute_dtype),
        ("state_dtype", layout.state_dtype),
        ("device of PETSc's vectors", layout.vec_device.type),
        ("t", times),
        ("jumps", checked_jumps(settings.jumps)),
        ("step_size", None if settings.step_size is None else float(settings.step_size)),
        ("number of steps", None if settings.grid is None else settings.grid.steps),
        ("rtol", _in_words(settings.rtol)),
        ("atol", _in_words(settings.atol)),
        ("adaptor", settings.adaptor if settings.rule is None else str(settings.rule)),
        *((name, getattr(settings, name)) for name in _OF_STEPS),
        ("func", _form(func)),
        ("mass", "none" if settings.mass is None else "given"),
        ("preconditioner", _name(settings.preconditioner)),
        ("newton", settings.newton),
        ("compile", False if settings.compiler is None else settings.compiler.name),
        ("options", _options(settings.options)),
        ("outputs", str(settings.saving)),
        ("observe", "none" if settings.observe is None else "given"),
        ("between_steps", "none" if settings.between_steps is None else "given"),
        ("integrated parts", settings.uncontrolled),
        ("on_output", "none" if settings.on_output is None else "given"),
        ("on_mismatch", settings.on_mismatch),
        ("gradient", needs_gradient),
        ("gradient with respect to t", needs_time_gradient),
        ("fixed_plan", None if settings.fixed_plan is None else settings.fixed_plan.work),
        *settings.compared,
    ]
    trajectory = settings.trajectory or budget.DEFAULT
    if needs_gradient:
        found += [(f"trajectory: {name}", getattr(trajectory, name)) for name in _OF_BUDGET]
    return tuple(found)


def _in_words(tolerance: Tolerance | None) -> float | str | None:
    return tolerance if tolerance is None or isinstance(tolerance, int | float) else "tensors"


def _form(func: Any) -> str:
    """Return the form of f, which decides on the collective operations of a solve."""
    for form in (SplitFunction, MatrixFunction, Separable, WithTangent):
        if isinstance(func, form):
            return form.__name__
    return "function"


def _name(preconditioner: Any) -> str:
    if preconditioner is None or isinstance(preconditioner, str):
        return preconditioner or "none"
    return type(preconditioner).__name__


def _options(options: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} = {options[name]!r}" for name in sorted(options)) if options else "none"
