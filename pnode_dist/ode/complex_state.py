"""Complex states: a solve of real and imaginary parts, around a right-hand side of complex numbers.

The solve sees `torch.view_as_real` of the complex parts of a state, `[..., 2]`. f gets and returns complex tensors, at
no cost: both forms are the same memory. Gradients are those of torch, the derivatives with respect to the conjugate
times two: du = -grad is the direction of steepest descent of a real loss. Newton's method uses the real Jacobian, so f
need not be holomorphic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import State
from pnode_dist.ode.rhs.wrapped import wrapped
from pnode_dist.ode.saving import Integrated, Saved
from pnode_dist.ode.settings import CallSettings
from pnode_dist.ode.steppers.preconditioner import AssembledJacobian

_COMPUTE_TYPES = (None, torch.float32, torch.float64)


@dataclass(frozen=True)
class ComplexForm:
    """The form of a state with complex parts: `complex_parts[i]` is True for a complex part i."""

    complex_parts: tuple[bool, ...]
    is_tuple: bool

    def real(self, state: Any) -> Any:
        """Return a state, or something for each part of it, with real views of its complex parts."""
        return self._mapped(state, _as_real)

    def complex(self, state: Any) -> Any:
        """Return the state whose real view this is."""
        return self._mapped(state, torch.view_as_complex)

    def _mapped(self, state: Any, change: Any) -> Any:
        if not self.is_tuple:
            return change(state)
        pairs = zip(state, self.complex_parts, strict=True)
        return tuple(change(part) if is_complex else part for part, is_complex in pairs)


@dataclass(frozen=True)
class RealCall:
    """A call in real numbers: right-hand side, initial state and settings. `form` is None if it was one already."""

    func: Function
    u0: State
    settings: CallSettings
    form: ComplexForm | None

    def inputs(self, state: Any) -> Any:
        """Return a state of the caller's, such as a tangent of `u0`, for the real call."""
        if self.form is None:
            return state
        try:
            return self.form.real(state)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            raise ConfigurationError("u0_tangent: must have the form of u0, with the same complex parts") from None

    def outputs(self, found: Any) -> Any:
        """Return the outputs of the real call as those of the caller's."""
        if self.form is None or found is None:
            return found
        if isinstance(found, Integrated):
            return Integrated(self.outputs(found.u), found.integral)
        if isinstance(found, Saved):
            return Saved(found.t, self.outputs(found.u))
        return found if self.settings.observe is not None else self.form.complex(found)


Kept = dict[tuple[ComplexForm, str], tuple[Function, Function]]
"""Functions of real views that a model keeps between its calls, with those that they call, by their names."""


def real_call(func: Function, u0: Any, settings: CallSettings, kept: Kept | None = None) -> RealCall:
    """Return the call in real numbers of a state that may be complex. `kept` returns the same function each time.

    Raises `ConfigurationError` for settings that a complex state does not allow.
    """
    parts = tuple(u0) if isinstance(u0, tuple | list) else (u0,)
    flags = tuple(isinstance(part, torch.Tensor) and part.is_complex() for part in parts)
    if not any(flags):
        return RealCall(func, u0, settings, None)
    form = ComplexForm(flags, isinstance(u0, tuple | list))
    kept = {} if kept is None else kept
    real = _of_real_views(func, form, "func", kept)
    return RealCall(real, form.real(u0), _settings(settings, form, parts, kept), form)


def _of_real_views(func: Function, form: ComplexForm, name: str, kept: Kept) -> Function:
    """Return the function of real views around `func`, the same one as before if it is in `kept`."""
    known = kept.get((form, name))
    if known is None or known[0] is not func:
        known = kept[form, name] = func, wrapped(func, _OnRealViews(form, name), keeps_matrices=True)
    return known[1]


@dataclass(frozen=True)
class _OnRealViews:
    """The evaluation of a right-hand side of complex tensors at a state of real views. `name` is that in errors."""

    form: ComplexForm
    name: str = "func"

    def __call__(self, func: Function, t: torch.Tensor, u: Any, args: tuple[Any, ...]) -> Any:
        """Return real views of the value. Raises `TypeError` or `ValueError` for a value that is not like u."""
        state = self.form.complex(u)
        value = func(t, state, *args)
        if not self.form.is_tuple:
            return _real_rate(value, state, self.name)
        if not isinstance(value, tuple | list) or len(value) != len(state):
            raise TypeError(
                f"{self.name} must return a tuple of {len(state)} tensors like u, got {type(value).__name__}"
            )
        triples = zip(value, state, self.form.complex_parts, strict=True)
        return tuple(_real_rate(rate, part, self.name) if is_complex else rate for rate, part, is_complex in triples)


def _real_rate(rate: Any, part: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(rate, torch.Tensor) or not rate.is_complex():
        found = rate.dtype if isinstance(rate, torch.Tensor) else type(rate).__name__
        raise TypeError(f"{name} returned {found} for a part of {part.dtype}: that of a complex part must be complex")
    if rate.shape != part.shape:
        raise ValueError(
            f"{name} returned shape {tuple(rate.shape)} for a state of shape {tuple(part.shape)}: it must have the "
            "shape of u"
        )
    return _as_real(rate)


def _as_real(value: torch.Tensor) -> torch.Tensor:
    # A conjugate is a mark on the memory of the number itself, of which there is no real view.
    return torch.view_as_real(value.resolve_conj())


def _settings(settings: CallSettings, form: ComplexForm, parts: Sequence[torch.Tensor], kept: Kept) -> CallSettings:
    """Return the settings of the solve of real views."""
    if settings.compute_dtype not in _COMPUTE_TYPES:
        raise ConfigurationError(
            f"compute_dtype = {settings.compute_dtype}: must be torch.float32, torch.float64 or None for a complex u0"
        )
    if settings.preconditioner == "assembled" or isinstance(settings.preconditioner, AssembledJacobian):
        raise ConfigurationError("preconditioner: 'assembled' is for real states: must be 'none' or 'block'")
    tolerances: dict[str, Any] = {name: _tolerance(getattr(settings, name), form) for name in ("rtol", "atol")}
    functions: dict[str, Any] = {
        name: _OfViews(given, form) if callable(given := getattr(settings, name)) else given
        for name in ("observe", "integrate")
    }
    if settings.between_steps is not None:
        functions["between_steps"] = _of_real_views(settings.between_steps, form, "between_steps", kept)
    on_output = settings.on_output
    if on_output is not None and settings.observe is None:
        functions["on_output"] = lambda time, found: on_output(time, _complex_output(form, found))
    return replace(settings, mass=_mass(settings.mass, form, parts), **tolerances, **functions)


class _OfViews:
    """A function of a complex state, such as an observation, at its real views."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, function: Function, form: ComplexForm) -> None:
        self.function, self.form = function, form

    def __call__(self, t: torch.Tensor, u: Any, *args: Any) -> Any:
        return self.function(t, self.form.complex(u), *args)


def _complex_output(form: ComplexForm, found: Any) -> Any:
    """Return one output of the real call as that of the caller's."""
    return Integrated(form.complex(found.u), found.integral) if isinstance(found, Integrated) else form.complex(found)


def _tolerance(tolerance: Any, form: ComplexForm) -> Any:
    """Return a tolerance for real views: real and imaginary part of a number have the same."""
    if isinstance(tolerance, tuple | list) and len(tolerance) == len(form.complex_parts):
        pairs = zip(tolerance, form.complex_parts, strict=True)
        return tuple(_spread(value) if is_complex else value for value, is_complex in pairs)
    if isinstance(tolerance, torch.Tensor) and tolerance.dim() > 0:
        if form.is_tuple:
            return tuple(_spread(tolerance) if is_complex else tolerance for is_complex in form.complex_parts)
        return _spread(tolerance)
    return tolerance


def _spread(tolerance: Any) -> Any:
    return tolerance.unsqueeze(-1) if isinstance(tolerance, torch.Tensor) and tolerance.dim() > 0 else tolerance


def _mass(mass: Any, form: ComplexForm, parts: Sequence[torch.Tensor]) -> Any:
    """Return the mass matrix of real views. A Mat acts on them already."""
    if isinstance(mass, tuple | list) and len(mass) == len(parts):
        return tuple(
            _diagonal(value, part) if is_complex else value
            for value, part, is_complex in zip(mass, parts, form.complex_parts, strict=True)
        )
    if isinstance(mass, torch.Tensor) and not form.is_tuple:
        return _diagonal(mass, parts[0])
    return mass


def _diagonal(mass: Any, part: torch.Tensor) -> Any:
    if not isinstance(mass, torch.Tensor):
        return mass
    if mass.is_complex() or mass.shape != part.shape:
        raise ConfigurationError(
            f"mass: {mass.dtype} of shape {tuple(mass.shape)} for a complex part of shape {tuple(part.shape)}: must be "
            "the real diagonal, of the same shape"
        )
    return mass.unsqueeze(-1).expand(*mass.shape, 2)
