"""The `options` of torchdiffeq: those of methods that adapt their steps, and those of methods with given steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.steppers.step_rule import StepRule
from pnode_dist.torchdiffeq.methods import NamedMethod

_NUMBERS = ("safety", "ifactor", "dfactor", "min_step", "max_step")
ADAPTIVE = (*_NUMBERS, "first_step", "max_num_steps", "norm", "step_t", "jump_t", "dtype")
FIXED = ("step_size", "grid_constructor", "interp", "perturb")
_ELSEWHERE = {
    "step_size": "the steps of {method!r} follow from rtol and atol: use max_step, or a method such as 'rk4'",
    "grid_constructor": "the steps of {method!r} follow from rtol and atol: use step_t for times where steps end",
    "interp": "steps of {method!r} end at every time of t: nothing is interpolated",
    "perturb": "use jump_t for times at which func jumps",
    "step_t": "{method!r} takes the steps of step_size or grid_constructor: put such times into the grid",
    "jump_t": "{method!r} takes the steps of step_size or grid_constructor: use 'dopri5', or solve from jump to jump",
    "norm": "{method!r} takes given steps, without an error to measure",
    "max_order": "is for Adams methods, which are not there",
    "max_iters": "Newton's method ends at its tolerance: use pnode_dist.odeint with options={{'snes_max_it': ...}}",
    "grid_points": "is the former name of step_t: use that",
    "eps": "is the former name of perturb, or of jump_t with 'dopri5': use these",
    "solver": "is for 'scipy_solver', which is not there",
}


@dataclass(frozen=True)
class AdaptiveOptions:
    """The options of a method that adapts its steps.

    `rule` holds the numbers. `step_t` and `jump_t` are sorted times.
    """

    rule: StepRule
    first_step: float | None
    step_t: tuple[float, ...]
    jump_t: tuple[float, ...]


@dataclass(frozen=True)
class FixedOptions:
    """The options of a method with given steps. `interp` is `linear` or `cubic`.

    `perturb`: f may jump where a step ends, and is evaluated inside of each step.
    """

    step_size: float | None
    grid_constructor: Callable[..., torch.Tensor] | None
    interp: str
    perturb: bool = False


def adaptive_options(method: NamedMethod, given: Mapping[str, Any] | None) -> AdaptiveOptions:
    """Check the options of an adaptive method. Raises `ConfigurationError` for the first that is wrong."""
    options = _known(method, given, ADAPTIVE)
    numbers = {name: _number(name, options[name]) for name in _NUMBERS if options.get(name) is not None}
    if not 0 < numbers.get("safety", 0.9) <= 1:
        raise _wrong("safety", numbers["safety"], "in (0, 1]")
    if not numbers.get("ifactor", 10.0) >= 1:
        raise _wrong("ifactor", numbers["ifactor"], "at least 1")
    if not 0 < numbers.get("dfactor", 0.2) < 1:
        raise _wrong("dfactor", numbers["dfactor"], "in (0, 1)")
    if not 0 <= numbers.get("min_step", 0.0) <= numbers.get("max_step", math.inf):
        raise _wrong("min_step", numbers.get("min_step", 0.0), "between 0 and max_step")
    if not numbers.get("max_step", math.inf) > 0:
        raise _wrong("max_step", numbers["max_step"], "positive")
    first = options.get("first_step")
    most = _number("max_num_steps", options.get("max_num_steps", StepRule.max_num_steps))
    if not (most >= 1 and most.is_integer()):
        raise _wrong("max_num_steps", options["max_num_steps"], "at least 1, and a whole number")
    if options.get("dtype", torch.float64) is not torch.float64:
        raise _wrong("dtype", options["dtype"], "torch.float64, the type of times and sizes of steps")
    norm = options.get("norm")
    if norm is not None and not callable(norm):
        raise _wrong("norm", norm, "a function of a state")
    rule = StepRule(**numbers, max_num_steps=int(most), error_scale=method.error_scale, norm=norm)
    step_t, jump_t = _times("step_t", options.get("step_t")), _times("jump_t", options.get("jump_t"))
    repeated = set(step_t) & set(jump_t)
    if repeated or len({*step_t, *jump_t}) < len(step_t) + len(jump_t):
        raise ConfigurationError(f"options: step_t, jump_t: a time is repeated: {sorted((*step_t, *jump_t))}")
    return AdaptiveOptions(rule, None if first is None else _positive("first_step", first), step_t, jump_t)


def fixed_options(method: NamedMethod, given: Mapping[str, Any] | None) -> FixedOptions:
    """Check the options of a method with given steps. Raises `ConfigurationError` for the first that is wrong."""
    options = _known(method, given, FIXED)
    size, grid = options.get("step_size"), options.get("grid_constructor")
    if size is not None and grid is not None:
        raise ConfigurationError("options: step_size and grid_constructor exclude each other")
    if grid is not None and not callable(grid):
        raise _wrong("grid_constructor", grid, "a function of func, y0 and t")
    if options.get("interp", "linear") not in ("linear", "cubic"):
        raise _wrong("interp", options["interp"], "'linear' or 'cubic'")
    perturb, interp = options.get("perturb", False), options.get("interp", "linear")
    if not isinstance(perturb, bool):
        raise _wrong("perturb", perturb, "True or False")
    if perturb and interp == "cubic":
        raise ConfigurationError(
            "options: interp = 'cubic': must be 'linear' with perturb, where func has no one slope"
        )
    return FixedOptions(None if size is None else _positive("step_size", size), grid, interp, perturb)


def _known(method: NamedMethod, given: Mapping[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the options as a dictionary. Raises `ConfigurationError` for a name that the method does not take."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"options = {given!r}: must be a dictionary")
    for name in given:
        if name not in names:
            reason = _ELSEWHERE.get(name, f"must be one of {', '.join(names)}").format(method=method.name)
            near = get_close_matches(str(name), names, n=1) if name not in _ELSEWHERE else []
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigurationError(f"options: {name!r}{hint}: {reason}")
    return dict(given)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(name, value, "a number") from None
    if math.isnan(number):
        raise _wrong(name, value, "a number")
    return number


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise _wrong(name, value, "positive (its direction follows from t)")
    return number


def _times(name: str, value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    times = torch.as_tensor(value, dtype=torch.float64).detach()
    if times.dim() != 1 or not bool(times.isfinite().all()):
        raise _wrong(name, value, "a one-dimensional tensor of finite times")
    return tuple(sorted(times.tolist()))


def _wrong(name: str, value: Any, allowed: str) -> ConfigurationError:
    return ConfigurationError(f"options: {name} = {value!r}: must be {allowed}")
