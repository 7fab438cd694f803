"""Observations of a solve: a function h(t, u) whose values are returned in place of the states.

A right-hand side and its observation travel together as one `Observed`: both may hold parameters and values that the
backward pass restores, and both have tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from pnode_dist.ode.rhs.between import Mapped
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.saving import Integrated

Observation = Callable[..., Any]
"""h(t, u, *args): a tensor, or a tuple or a dictionary of tensors, from the time and this rank's part of the state."""
Observations = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]


class OfParts(Protocol):
    """An observation in the form of the solve: a tuple of tensors from the parts of the state."""

    def __call__(self, t: torch.Tensor, parts: Parts, *args: Any) -> Parts:
        """Return the tensors that are observed. Collective if the user's function is."""
        ...


class Form(NamedTuple):
    """The form of an observation: a tensor, a tuple, or a dictionary with `keys`. `size` is the number of tensors."""

    kind: type
    size: int
    keys: tuple[str, ...] = ()

    def rebuilt(self, values: Sequence[torch.Tensor]) -> Observations:
        """Return tensors in this form."""
        if self.kind is torch.Tensor:
            return values[0]
        return dict(zip(self.keys, values, strict=True)) if self.kind is dict else tuple(values)


class _Seen:
    """The form of the last value. An object of its own, which is not restored with the values that h reads."""

    form: Form | None = None


class Flattened:
    """An observation with its values as a tuple. `name` is that of the function in errors.

    Raises `TypeError` if the observation is no function.
    """

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, observe: Observation, is_tuple: bool, name: str = "observe") -> None:
        if not callable(observe):
            raise TypeError(f"{name} must be callable as {name}(t, u, *args), got {type(observe).__name__}")
        self.observe, self.is_tuple, self.name = observe, is_tuple, name
        self._seen = _Seen()

    @property
    def form(self) -> Form | None:
        """The form of the values; None before the first evaluation."""
        return self._seen.form

    def __call__(self, t: torch.Tensor, parts: Parts, *args: Any) -> Parts:
        """Return the tensors that are observed. Raises `TypeError` for other values."""
        value = self.observe(t, parts if self.is_tuple else parts[0], *args)
        form, leaves = flattened(value, self.name)
        if self.form not in (None, form):
            raise TypeError(f"{self.name} returned {_described(value)} at t = {float(t):.6g}, and another form before")
        self._seen.form = form
        return leaves


def flattened(value: Any, name: str) -> tuple[Form, Parts]:
    """Return the form of a value and its tensors. Raises `TypeError` for anything else that `name` returned."""
    if isinstance(value, torch.Tensor):
        form, leaves = Form(torch.Tensor, 1), (value,)
    elif isinstance(value, Mapping):
        form, leaves = Form(dict, len(value), tuple(value)), tuple(value.values())
    else:
        leaves = tuple(value) if isinstance(value, tuple | list) else (value,)
        form = Form(tuple, len(leaves))
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"{name} returned {_described(value)}: must be a floating-point tensor, or a tuple or a dictionary of "
                "such tensors"
            )
    return form, leaves


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, Mapping):
        return f"a dictionary of {', '.join(_described(entry) for entry in value.values()) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a tuple of {', '.join(map(_described, value)) or 'nothing'}"
    return type(value).__name__


class Observed:
    """A right-hand side with the observation of its solves."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function, observe: Callable[..., Parts]) -> None:
        self.func, self.observe = func, observe

    def __call__(self, t: torch.Tensor, state: Any, *args: Any) -> Any:
        """Return du/dt."""
        return self.func(t, state, *args)


class Costed:
    """A right-hand side, which may be `Observed`, with a running cost that is integrated beside its solves."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function, cost: Flattened) -> None:
        self.func, self.cost = func, cost

    def __call__(self, t: torch.Tensor, state: Any, *args: Any) -> Any:
        """Return du/dt."""
        return self.func(t, state, *args)


def observed(func: Function, observe: Observation | None, is_tuple: bool) -> Function:
    """Return `func` with an observation, or `func` itself. Raises `TypeError` if the observation is no function."""
    if observe is None:
        return func
    return Observed(func, Flattened(observe, is_tuple))


def in_form_of(func: Function, layout: StateLayout, values: Parts) -> Any:
    """Return the outputs of a solve, or one of them, as its caller gets them: states, or observations."""
    if isinstance(func, Costed):
        form = func.cost.form
        assert form is not None
        own, integrals = values[: -form.size], values[-form.size :]
        return Integrated(in_form_of(func.func, layout, own), form.rebuilt(integrals))
    observe = separated(func)[1]
    form = getattr(observe, "form", None)
    if observe is None:
        return layout.as_state(values)
    return values if form is None else form.rebuilt(values)


def cost_of(func: Function) -> Callable[..., Parts] | None:
    """Return the running cost that is integrated beside the solves of `func`, None without one."""
    return func.cost if isinstance(func, Costed) else None


def between_of(func: Function) -> Callable[..., Parts] | None:
    """Return the map between the steps of the solves of `func`, None without one."""
    while isinstance(func, Costed | Observed):
        func = func.func
    return func.between if isinstance(func, Mapped) else None


def separated(func: Function) -> tuple[Function, Callable[..., Parts] | None]:
    """Return the right-hand side alone, and its observation, None without one."""
    func = func.func if isinstance(func, Costed) else func
    func, observe = (func.func, func.observe) if isinstance(func, Observed) else (func, None)
    return func.func if isinstance(func, Mapped) else func, observe
