"""The callbacks of torchdiffeq: methods of func that are called at each step."""

from __future__ import annotations

from typing import Any

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.steppers.step_rule import StepCallbacks
from pnode_dist.torchdiffeq.methods import NamedMethod

_ATTEMPTS = ("callback_accept_step", "callback_reject_step")
_NAMES = ("callback_step", *_ATTEMPTS)


def callbacks_of(func: Any, method: NamedMethod) -> StepCallbacks:
    """Return func's callbacks.

    Raises `ConfigurationError` for anything but functions, and for those that a method with given steps never calls.
    """
    step, accept, reject = found = [getattr(func, name, None) for name in _NAMES]
    for name, callback in zip(_NAMES, found, strict=True):
        if callback is not None and not callable(callback):
            raise ConfigurationError(f"func.{name} = {callback!r}: must be a function of t, y and the size of the step")
        if callback is not None and name in _ATTEMPTS and not method.adaptive:
            raise ConfigurationError(
                f"func.{name}: method = {method.name!r} takes given steps, and accepts every one: define "
                "callback_step alone"
            )
    return StepCallbacks(step, accept, reject)


def refuse_adjoint_callbacks(func: Any) -> None:
    """Raise `ConfigurationError` for a callback of steps of the adjoint equation, which is not solved here."""
    for name in _NAMES:
        if getattr(func, f"{name}_adjoint", None) is not None:
            raise ConfigurationError(
                f"func.{name}_adjoint: the gradient is that of the steps of the forward pass, without an adjoint "
                f"equation: use {name}"
            )
