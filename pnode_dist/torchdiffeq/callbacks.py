"""The callbacks of torchdiffeq: methods of func that are called at each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.steppers.step_rule import StepCallback, StepCallbacks
from pnode_dist.torchdiffeq.methods import NamedMethod

_STEP, _ACCEPT, _REJECT = _NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")


def callbacks_of(func: Any, method: NamedMethod, is_adjoint: bool) -> StepCallbacks:
    """Return func's callbacks; with `is_adjoint` also those of the backward pass.

    Raises `ConfigurationError` for anything but functions. Warns like torchdiffeq of those that are never called: a
    method with given steps accepts every one.
    """
    step, accept, reject = (_callback(func, name) for name in _NAMES)
    back = [_callback(func, f"{name}_adjoint") if is_adjoint else None for name in _NAMES]
    if not method.adaptive:
        unused = [name for name, callback in ((_ACCEPT, accept), (_REJECT, reject)) if callback is not None]
        unused += [
            f"{name}_adjoint" for name, callback in zip(_NAMES[1:], back[1:], strict=True) if callback is not None
        ]
        if unused:
            warnings.warn(
                f"{', '.join(f'func.{name}' for name in unused)}: never called: method = {method.name!r} takes given "
                "steps, and accepts every one",
                UserWarning,
                stacklevel=2,
            )
        accept = reject = None
        back = [back[0], None, None]
    return StepCallbacks(step, accept, reject, pulled_back=_both(back[0], back[1]))


def _callback(func: Any, name: str) -> StepCallback | None:
    callback: Callable[..., Any] | None = getattr(func, name, None)
    if callback is not None and not callable(callback):
        raise ConfigurationError(f"func.{name} = {callback!r}: must be a function of t, y and the size of the step")
    return callback


def _both(step: StepCallback | None, accept: StepCallback | None) -> StepCallback | None:
    """Return one function for both callbacks of a step of the backward pass, which is always accepted."""
    callbacks = [callback for callback in (step, accept) if callback is not None]
    if not callbacks:
        return None

    def called(t: torch.Tensor, y: Any, h: torch.Tensor) -> None:
        for callback in callbacks:
            callback(t, y, h)

    return called
