"""torchdiffeq's names of methods, and the methods that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pnode_dist.errors import ConfigurationError

DEFAULT = "dopri5"


@dataclass(frozen=True)
class NamedMethod:
    """A method under its name in torchdiffeq.

    `native` is its name in `pnode_dist.ode.methods`. `adaptive`: it adapts its steps to the tolerances; the others take
    the steps that the options ask for. `error_scale` is torchdiffeq's error estimate in units of the native one.
    """

    name: str
    native: str
    adaptive: bool
    error_scale: float = 1.0


METHODS = {
    method.name: method
    for method in (
        NamedMethod("dopri8", "dopri8", True),
        # Shampine's embedded weights, which torchdiffeq has, give two thirds of Dormand & Prince's estimate.
        NamedMethod("dopri5", "dopri5", True, error_scale=2 / 3),
        NamedMethod("tsit5", "tsit5", True),
        NamedMethod("bosh3", "bosh3", True),
        NamedMethod("fehlberg2", "fehlberg2", True),
        NamedMethod("adaptive_heun", "heun", True),
        NamedMethod("euler", "euler", False),
        NamedMethod("midpoint", "midpoint", False),
        NamedMethod("heun2", "heun", False),
        NamedMethod("heun3", "heun3", False),
        NamedMethod("rk4", "rk4_38", False),
        NamedMethod("implicit_euler", "beuler", False),
        NamedMethod("implicit_midpoint", "theta", False),
        NamedMethod("trapezoid", "cn", False),
        NamedMethod("gl4", "gauss4", False),
        NamedMethod("gl6", "gauss6", False),
        NamedMethod("radauIIA3", "radau3", False),
        NamedMethod("radauIIA5", "radau5", False),
        NamedMethod("sdirk2", "sdirk2", False),
        NamedMethod("trbdf2", "dirk_es213sal", False),
    )
}
_MULTISTEP = "is a multistep method, and those here have no gradient: use 'rk4' with the same steps, or 'dopri5'"
REFUSED = {
    "explicit_adams": _MULTISTEP,
    "implicit_adams": _MULTISTEP,
    "fixed_adams": _MULTISTEP,
    "scipy_solver": "has no gradient: use 'dopri5', or 'radauIIA5' or 'trbdf2' for stiff problems",
}


def named(name: str | None) -> NamedMethod:
    """Return the method of a name; None is the default. Raises `ConfigurationError` with what to use instead."""
    chosen = DEFAULT if name is None else name
    if chosen in METHODS:
        return METHODS[chosen]
    if chosen in REFUSED:
        raise ConfigurationError(f"method = {chosen!r}: {REFUSED[chosen]}")
    near = get_close_matches(str(chosen), METHODS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigurationError(f"method = {chosen!r}{hint}: must be one of {', '.join(METHODS)}")
