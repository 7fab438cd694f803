"""Error control: tolerances, the norm of the error, and the size of the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import State, StateLayout
from pnode_dist.ode.steppers.base import Stepper
from pnode_dist.ode.steppers.step_rule import NO_CALLBACKS, StepCallbacks, StepRule
from pnode_dist.petsc import vectors

ADAPTORS = ("basic", "dsp", "pid")
DEFAULT_RTOL, DEFAULT_ATOL = 1e-6, 1e-9

Tolerance = float | State


@dataclass(frozen=True)
class StepLimits:
    """The bounds of the steps of a solve.

    - `dt_min`: a rejected step is not repeated with a smaller size. A step that ends at an output time may be shorter.
    - `dt_max`: the longest step. `max_steps`: the most attempts, rejected ones included; None is no limit.

    Raises `ConfigurationError` for bounds that exclude each other.
    """

    dt_min: float = 0.0
    dt_max: float = math.inf
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.dt_min <= self.dt_max:
            raise ConfigurationError(f"dt_min = {self.dt_min!r}: must be at most dt_max = {self.dt_max!r}")

    def within(self, size: float) -> float:
        """Return a positive size within the bounds."""
        return min(max(size, self.dt_min), self.dt_max)


def is_positive(value: object) -> bool:
    """Return True for a positive, finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def check_max_steps(most: int | None) -> None:
    """Raise `ConfigurationError` for a limit that is not a positive integer."""
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ConfigurationError(f"max_steps = {most!r}: must be an integer, at least 1")


@dataclass(frozen=True, eq=False)
class ErrorControl:
    """The settings of error control.

    A step is accepted if the root mean square over all entries of error / (atol + rtol |u|) is at most 1.
    Tolerances are numbers, or tensors that broadcast to this rank's part of the state (for a tuple one for each part).
    `adaptor` is PETSc's `basic` or `dsp` (digital signal processing control: Soederlind, ACM Trans. Math. Softw. 29,
    2003), or `pid` for a `rule`. `first_size` is the size of the first step; with None it follows from f and its change
    (Hairer, Norsett & Wanner, Solving ODEs I, II.4). A `rule` replaces PETSc's adaptor for explicit methods; then a
    tolerance may be zero, and `callbacks` are called. `uncontrolled` parts at the end of the state have no part in the
    mean. `limits` are the bounds of the steps. Raises `ConfigurationError` for tolerances that are not positive or an
    unknown adaptor.
    """

    rtol: Tolerance = DEFAULT_RTOL
    atol: Tolerance = DEFAULT_ATOL
    adaptor: str = "basic"
    first_size: float | None = None
    rule: StepRule | None = None
    callbacks: StepCallbacks = NO_CALLBACKS
    uncontrolled: int = 0
    limits: StepLimits = StepLimits()

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            wanted = "positive" if self.rule is None else "positive or zero"
            if isinstance(value, int | float) and not (math.isfinite(value) and self._allows(value)):
                raise ConfigurationError(f"{name} = {value!r}: must be {wanted}")
            parts = value if isinstance(value, tuple | list) else [value]
            if any(isinstance(part, torch.Tensor) and not self._allows(part) for part in parts):
                raise ConfigurationError(f"{name}: every entry must be {wanted}")
        if self.adaptor not in ADAPTORS:
            raise ConfigurationError(f"adaptor = {self.adaptor!r}: must be one of {', '.join(ADAPTORS)}")

    def _allows(self, values: float | torch.Tensor) -> bool:
        allowed = torch.as_tensor(values) > 0 if self.rule is None else torch.as_tensor(values) >= 0
        return bool(allowed.all())


class Tolerances:
    """The tolerances of a solve on the state of `stepper`, in PETSc's form."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._values: list[torch.Tensor | float] = [DEFAULT_RTOL, DEFAULT_ATOL]
        self._of_petsc: list[Any] = [DEFAULT_RTOL, DEFAULT_ATOL]
        self._uncontrolled = 0

    def take(self, control: ErrorControl, ts: PETSc.TS) -> None:
        """Set the tolerances of `control` on `ts`. Raises `ConfigurationError` if their shape is wrong."""
        vecs: list[Any] = []
        before = self._of_petsc
        sizes = self._stepper.layout.sizes
        self._uncontrolled = sum(sizes[len(sizes) - control.uncontrolled :])
        for number, (name, tolerance) in enumerate((("rtol", control.rtol), ("atol", control.atol))):
            is_number = isinstance(tolerance, int | float) and control.uncontrolled == 0
            if is_number and not isinstance(self._of_petsc[number], PETSc.Vec):
                assert isinstance(tolerance, int | float)
                self._values[number] = float(tolerance)
                vecs.append(float(tolerance))
                continue
            # After a Vec of tolerances PETSc ignores a number, so keep using Vecs.
            layout = self._stepper.layout
            vec = vectors.create_vec(self._stepper.comm, layout.size, layout.vec_device)
            flat = vectors.view(vec, (layout.size,), layout.vec_device)
            _spread(name, tolerance, layout, flat, control.uncontrolled)
            vectors.wrote(vec, layout.vec_device)
            self._values[number] = flat
            vecs.append(vec)
        self._of_petsc = vecs
        self.give(ts)
        _destroy(before)

    def of_parts(self) -> tuple[Sequence[torch.Tensor | float], Sequence[torch.Tensor | float]]:
        """Return the relative and the absolute tolerance of each part of the state."""
        layout = self._stepper.layout
        rtol, atol = (
            layout.parts(value) if isinstance(value, torch.Tensor) else (value,) * len(layout.shapes)
            for value in self._values
        )
        return rtol, atol

    def destroy(self) -> None:
        """Destroy the Vecs of tolerances. Collective on the communicator."""
        _destroy(self._of_petsc)
        self._of_petsc = [DEFAULT_RTOL, DEFAULT_ATOL]

    def give(self, ts: PETSc.TS) -> None:
        """Set the present tolerances on another `ts`."""
        ts.setTolerances(rtol=self._of_petsc[0], atol=self._of_petsc[1])

    def first_size(self, time: float, span: float) -> float:
        """Choose the size of the first step, for a solve of length `span`. Collective on the communicator.

        E. Hairer, S. P. Norsett, G. Wanner: Solving Ordinary Differential Equations I, 2nd ed., section II.4.
        """
        stepper = self._stepper
        state = stepper.current.flat.clone()
        rtol, atol = self._values
        scale = atol + rtol * state.abs()
        # PETSc leaves out entries with two zero tolerances, and so does the norm here.
        controlled = slice(None, scale.numel() - self._uncontrolled)
        scale = scale[controlled]
        slope = stepper.derivative(time, math.copysign(1.0, span))
        size, speed = self._norm(state[controlled] / scale), self._norm(slope[controlled] / scale)
        first = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
        first = min(first, abs(span))
        stepper.current.set_flat(state + math.copysign(first, span) * slope)
        later = stepper.derivative(time + math.copysign(first, span), math.copysign(1.0, span))
        bend = self._norm((later - slope)[controlled] / scale) / first
        stepper.current.set_flat(state)
        steepest = max(speed, bend)
        order = stepper.method.order
        second = max(1e-6, first * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / (order + 1))
        chosen = min(100 * first, second, abs(span))
        return chosen if math.isfinite(chosen) else abs(span) * 1e-6

    def _norm(self, values: torch.Tensor) -> float:
        sums = np.array([values.square().sum(dtype=torch.float64).item(), values.numel()])
        self._stepper.comm.Allreduce(MPI.IN_PLACE, sums, MPI.SUM)
        return math.sqrt(sums[0] / max(sums[1], 1.0))


def check_shapes(control: ErrorControl, layout: StateLayout) -> None:
    """Raise `ConfigurationError` for tolerances that do not fit the state on this rank."""
    for name, tolerance in (("rtol", control.rtol), ("atol", control.atol)):
        if not isinstance(tolerance, int | float):
            _spread(name, tolerance, layout, torch.empty(layout.size), control.uncontrolled)


def of_parts(
    name: str, tolerance: Tolerance, layout: StateLayout, uncontrolled: int = 0
) -> Sequence[torch.Tensor | float]:
    """Return a tolerance for each part of the state: a number, or a tensor of the part's shape.

    The last `uncontrolled` parts have zeros. Raises `ConfigurationError` if it does not fit the state on this rank.
    """
    if isinstance(tolerance, int | float):
        return (*(float(tolerance),) * (len(layout.shapes) - uncontrolled), *(0.0,) * uncontrolled)
    flat = torch.empty(layout.size, dtype=layout.state_dtype, device=layout.vec_device)
    _spread(name, tolerance, layout, flat, uncontrolled)
    return layout.parts(flat)


def _destroy(tolerances: list[Any]) -> None:
    for tolerance in tolerances:
        if isinstance(tolerance, PETSc.Vec):
            tolerance.destroy()


def _spread(name: str, tolerance: Tolerance, layout: StateLayout, flat: torch.Tensor, uncontrolled: int) -> None:
    count = len(layout.shapes) - uncontrolled
    tolerances = tuple(tolerance) if isinstance(tolerance, tuple | list) else (tolerance,) * count
    if len(tolerances) != count:
        raise ConfigurationError(f"{name}: {len(tolerances)} parts for a state of {count}")
    tolerances = (*tolerances, *(0.0,) * uncontrolled)
    for target, values in zip(layout.parts(flat), tolerances, strict=True):
        try:
            target.copy_(torch.as_tensor(values).expand(target.shape))
        except RuntimeError:
            raise ConfigurationError(
                f"{name}: shape {tuple(torch.as_tensor(values).shape)} does not broadcast to this rank's part of shape "
                f"{tuple(target.shape)}"
            ) from None
