"""The table of time-stepping methods."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pnode_dist.errors import ConfigurationError


@dataclass(frozen=True)
class Method:
    """An explicit Runge-Kutta method of PETSc's TSRK.

    `name` is the usual name and `petsc_name` TSRK's. `fsal`: the last stage is the first of the next step.
    `last_stage_weighs`: the last stage contributes to the step's result. Where it does not, it only serves the error
    estimate of adaptive stepping, and steps of fixed size do not evaluate it. `estimates_error`: there is such an
    estimate, by an embedded method. `source` is where the table comes from.
    """

    name: str
    petsc_name: str
    order: int
    stages: int
    fsal: bool
    last_stage_weighs: bool
    estimates_error: bool
    source: str

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the right-hand side in a step of fixed size."""
        return self.stages if self.last_stage_weighs else self.stages - 1


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("euler", "1fe", 1, 1, False, True, False, "Euler 1768"),
        Method("heun", "2a", 2, 2, False, True, True, "Heun 1900, the explicit trapezoidal rule"),
        Method("midpoint", "2b", 2, 2, False, True, False, "Runge 1895, the explicit midpoint rule"),
        Method("rk3", "3", 3, 3, False, True, False, "PETSc TSRK3, three stages at 0, 2/3, 2/3"),
        Method("bosh3", "3bs", 3, 4, True, False, True, "Bogacki & Shampine, Appl. Math. Lett. 2 (1989)"),
        Method("rk4", "4", 4, 4, False, True, False, "Kutta 1901, the classical method"),
        Method("fehlberg5", "5f", 5, 6, False, True, True, "Fehlberg, NASA TR R-315 (1969)"),
        Method("dopri5", "5dp", 5, 7, True, False, True, "Dormand & Prince, J. Comput. Appl. Math. 6 (1980)"),
        Method("bosh5", "5bs", 5, 8, True, False, True, "Bogacki & Shampine, Comput. Math. Appl. 32 (1996)"),
        Method("verner6", "6vr", 6, 9, True, False, True, "Verner's robust 6(5) pair, Numer. Algorithms 53 (2010)"),
        Method("verner7", "7vr", 7, 10, False, False, True, "Verner's robust 7(6) pair, Numer. Algorithms 53 (2010)"),
        Method("verner8", "8vr", 8, 13, False, False, True, "Verner's robust 8(7) pair, Numer. Algorithms 53 (2010)"),
    )
}

_BY_PETSC_NAME = {method.petsc_name: method for method in METHODS.values()}


def by_petsc_name(petsc_name: str) -> Method:
    """The method that TSRK calls `petsc_name`. Raises `ConfigurationError` if it is not in the table."""
    if petsc_name not in _BY_PETSC_NAME:
        raise ConfigurationError(f"ts_rk_type = {petsc_name!r}: must be one of {', '.join(_BY_PETSC_NAME)}")
    return _BY_PETSC_NAME[petsc_name]


def resolve(name: str) -> Method:
    """The method of a usual name (`rk4`) or of PETSc's (`4`).

    `rk4` is the classical method; torchdiffeq's `rk4` is Kutta's 3/8 rule.
    Raises `ConfigurationError` naming what is allowed.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _BY_PETSC_NAME:
        return _BY_PETSC_NAME[name]
    allowed = [*METHODS, *_BY_PETSC_NAME]
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigurationError(f"method = {name!r}{hint}: must be one of {', '.join(allowed)}")
