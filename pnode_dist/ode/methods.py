"""The table of time-stepping methods.

A method is data: its name in PETSc, and the facts that decide on gradients, error control and mass matrices.
`pnode_dist.ode.steppers.own_tables` adds some explicit methods to PETSc's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from pnode_dist.errors import ConfigurationError
from pnode_dist.system.compatibility import petsc4py_version, petsc_release

Family = Literal["rk", "theta", "arkimex", "dirk", "irk", "rosw", "bdf", "ssp", "symplectic"]
FAMILIES: dict[Family, str] = {
    "rk": "explicit Runge-Kutta",
    "theta": "implicit, one stage or two; also for mass matrices and DAEs",
    "arkimex": "additive Runge-Kutta: one part of the right-hand side implicit, the other explicit",
    "dirk": "diagonally implicit Runge-Kutta",
    "irk": "fully implicit Runge-Kutta, all stages as one system; also for mass matrices and DAEs",
    "rosw": "linearly implicit (Rosenbrock-W)",
    "bdf": "backward differentiation formulas",
    "ssp": "explicit, strong stability preserving",
    "symplectic": "explicit, symplectic for separable systems of pairs (q, p)",
}
_WITH_ADJOINT: tuple[Family, ...] = ("rk", "theta", "arkimex", "dirk", "irk")
TAKE_MASS = "beuler, cn, theta, radau3, radau5, gauss4 or gauss6"
ADJOINT_FLOORS: dict[Family, tuple[int, int]] = {"dirk": (3, 26)}
"""The first PETSc with an adjoint of a family, where older ones that are supported crash in it."""


@dataclass(frozen=True)
class Method:
    """A time-stepping method.

    - `name`: the usual name. `family`: PETSc's type of solver (see `FAMILIES`). `petsc_name`: the name in the family;
      empty if no TS of PETSc's takes the steps.
    - `fsal`: the last stage is the first of the next step.
    - `last_stage_weighs`: the last stage contributes to the step's result. Otherwise it serves the error estimate
      alone, and explicit steps of fixed size do not evaluate it.
    - `estimates_error`: the method has an error estimate.
    - `stiffly_accurate`: the step's result is its last stage, which stiff problems and algebraic equations need.
    - `adjoint`: the kind of adjoint, "none" for methods that solve forward only because PETSc has no adjoint of them.
      The tests compare all gradients with an independent implementation. `has_adjoint` also considers the installed
      PETSc.
    - `source`: the publication of the method.
    """

    name: str
    family: Family
    petsc_name: str
    order: int
    stages: int
    fsal: bool
    last_stage_weighs: bool
    estimates_error: bool
    stiffly_accurate: bool
    adjoint: Literal["verified", "none"]
    source: str

    @property
    def has_vec_state(self) -> bool:
        """True if the state is in a PETSc Vec, and so of PETSc's scalar type."""
        return self.family not in ("rk", "symplectic")

    @property
    def implicit(self) -> bool:
        """True if a step solves equations."""
        return self.family not in ("rk", "ssp", "symplectic")

    @property
    def evaluations_per_step(self) -> int:
        """The number of evaluations of the right-hand side in an explicit step of fixed size."""
        return self.stages if self.last_stage_weighs else self.stages - 1


def _explicit(
    name: str, petsc_name: str, order: int, stages: int, fsal: bool, weighs: bool, estimates: bool, source: str
) -> Method:
    return Method(name, "rk", petsc_name, order, stages, fsal, weighs, estimates, fsal, "verified", source)


def _theta(name: str, order: int, stages: int, stiffly_accurate: bool, source: str) -> Method:
    return Method(name, "theta", name, order, stages, False, True, True, stiffly_accurate, "verified", source)


def _table(family: Family, name: str, order: int, stages: int, estimates: bool, stiff: bool, source: str) -> Method:
    return Method(f"{family}_{name}", family, name, order, stages, False, True, estimates, stiff, "verified", source)


def _forward_only(family: Family, name: str, order: int, stages: int, estimates: bool, source: str) -> Method:
    full = name if family == "bdf" else f"{family}_{name}"
    return Method(full, family, name, order, stages, False, True, estimates, False, "none", source)


def _own_dirk(name: str, order: int, stages: int, estimates: bool, source: str) -> Method:
    return Method(name, "dirk", name, order, stages, False, True, estimates, True, "verified", source)


def _irk(name: str, order: int, stages: int, stiff: bool, source: str) -> Method:
    return Method(name, "irk", "", order, stages, False, True, False, stiff, "verified", source)


def _symplectic(name: str, order: int, evaluations: int, source: str) -> Method:
    return Method(name, "symplectic", "", order, evaluations, False, True, False, False, "verified", source)


_ARS = "Ascher, Ruuth & Spiteri, Appl. Numer. Math. 25 (1997)"
_PR = "Pareschi & Russo, J. Sci. Comput. 25 (2005)"
_GKC = "Giraldo, Kelly & Constantinescu, SIAM J. Sci. Comput. 35 (2013)"
_BPR = "Boscarino, Pareschi & Russo, arXiv 1110.4375 (2011)"
_KC = "Kennedy & Carpenter, Appl. Numer. Math. 44 (2003)"
_KC19 = "Kennedy & Carpenter, Appl. Numer. Math. 136 (2019)"
_AL = "Alamri & Ketcheson, arXiv 2211.14574 (2022)"
_RANG = "Rang & Angermann, BIT 45 (2005)"
_RANG15 = "Rang, J. Comput. Appl. Math. 286 (2015)"
_KVAERNO = "Kvaerno, BIT 44 (2004)"
_RALSTON = "Ralston, Math. Comp. 16 (1962)"
_HNW = "Hairer, Norsett & Wanner, Solving ODEs I (1993), sec. II.10"
_YOSHIDA = "Yoshida, Phys. Lett. A 150 (1990)"
_BUTCHER = "Butcher, Math. Comp. 18 (1964), Gauss points; A-stable and symplectic"
_EHLE = "Ehle, BIT 8 (1968), Radau IIA; L-stable"
_HW = "Hairer & Wanner, Solving ODEs II (1996), sec. IV.7"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _explicit("euler", "1fe", 1, 1, False, True, False, "Euler 1768"),
        _explicit(
            "heun", "2a", 2, 2, False, True, True, "Heun 1900, the explicit trapezoidal rule; also named `ssp22`"
        ),
        _explicit("midpoint", "2b", 2, 2, False, True, False, "Runge 1895, the explicit midpoint rule"),
        _explicit("fehlberg2", "2f", 2, 3, False, True, True, "Fehlberg, NASA TR R-315 (1969), 2(1)"),
        _explicit("rk3", "3", 3, 3, False, True, False, "PETSc TSRK3, three stages at 0, 2/3, 2/3"),
        _explicit("heun3", "3h", 3, 3, False, True, False, "Heun 1900, three stages at 0, 1/3, 2/3"),
        _explicit("bosh3", "3bs", 3, 4, True, False, True, "Bogacki & Shampine, Appl. Math. Lett. 2 (1989)"),
        _explicit("rk4", "4", 4, 4, False, True, False, "Kutta 1901, the classical method"),
        _explicit("rk4_38", "4k", 4, 4, False, True, False, "Kutta 1901, the 3/8 rule"),
        _explicit("fehlberg5", "5f", 5, 6, False, True, True, "Fehlberg, NASA TR R-315 (1969)"),
        _explicit("dopri5", "5dp", 5, 7, True, False, True, "Dormand & Prince, J. Comput. Appl. Math. 6 (1980)"),
        _explicit("bosh5", "5bs", 5, 8, True, False, True, "Bogacki & Shampine, Comput. Math. Appl. 32 (1996)"),
        _explicit("verner6", "6vr", 6, 9, True, False, True, "Verner's robust 6(5) pair, Numer. Algorithms 53 (2010)"),
        _explicit(
            "verner7", "7vr", 7, 10, False, False, True, "Verner's robust 7(6) pair, Numer. Algorithms 53 (2010)"
        ),
        _explicit(
            "verner8", "8vr", 8, 13, False, False, True, "Verner's robust 8(7) pair, Numer. Algorithms 53 (2010)"
        ),
        _explicit("dopri8", "8dp", 8, 13, False, True, True, "Prince & Dormand, J. Comput. Appl. Math. 7 (1981), 8(7)"),
        _explicit("ralston", "2r", 2, 2, False, True, True, _RALSTON),
        _explicit("ralston3", "3r", 3, 3, False, True, False, _RALSTON),
        _explicit("ssp33", "3s", 3, 3, False, True, False, "Shu & Osher, J. Comput. Phys. 77 (1988)"),
        _explicit("ssp104", "4s", 4, 10, False, True, False, "Ketcheson, SIAM J. Sci. Comput. 30 (2008)"),
        _explicit("tsit5", "5ts", 5, 7, True, False, True, "Tsitouras, Comput. Math. Appl. 62 (2011)"),
        _explicit("dop853", "853", 8, 12, False, True, True, f"{_HNW}, DOP853, with two error estimates"),
        _theta("beuler", 1, 1, True, "the implicit Euler method"),
        _theta("cn", 2, 2, True, "Crank & Nicolson, Proc. Camb. Phil. Soc. 43 (1947), the trapezoidal rule"),
        _theta("theta", 2, 1, False, "PETSc TSTHETA, by default the implicit midpoint rule"),
        _table("arkimex", "1bee", 1, 3, True, True, "two half steps of the implicit Euler method"),
        _table("arkimex", "a2", 2, 2, True, True, "PETSc TSARKIMEXA2, trapezoidal rule and Heun's method"),
        _table("arkimex", "l2", 2, 2, True, False, _PR),
        _table("arkimex", "ars122", 2, 2, True, False, _ARS),
        _table("arkimex", "2c", 2, 3, True, True, _GKC),
        _table("arkimex", "2d", 2, 3, True, True, "PETSc TSARKIMEX2D, Constantinescu"),
        _table("arkimex", "2e", 2, 3, True, True, "PETSc TSARKIMEX2E, Constantinescu"),
        _table("arkimex", "prssp2", 2, 3, False, True, _PR),
        _table("arkimex", "3", 3, 4, True, True, _KC),
        _table("arkimex", "bpr3", 1, 5, False, True, f"{_BPR}; PETSc's explicit table has order 1"),
        _table("arkimex", "ars443", 3, 5, False, True, _ARS),
        _table("arkimex", "4", 4, 6, True, True, _KC),
        _table("arkimex", "5", 5, 8, True, True, _KC),
        _table("dirk", "s212", 2, 2, True, False, "PETSc TSDIRKS212"),
        _table("dirk", "es122sal", 1, 2, True, True, "implicit Euler method with an explicit first stage"),
        _table("dirk", "es213sal", 2, 3, True, True, f"{_KC19}; also named `trbdf2` (Bank et al. 1985)"),
        _table("dirk", "es324sal", 3, 4, True, True, f"{_KC19}; also named `kvaerno3` (BIT 44, 2004)"),
        _table("dirk", "es325sal", 3, 5, True, True, _KC19),
        _table("dirk", "657a", 6, 7, True, False, _AL),
        _table("dirk", "es648sa", 6, 8, True, True, _AL),
        _table("dirk", "658a", 6, 8, True, True, _AL),
        _table("dirk", "s659a", 6, 9, True, True, _AL),
        _table("dirk", "7510sal", 7, 10, True, True, _AL),
        _table("dirk", "es7510sa", 7, 10, True, True, _AL),
        _table("dirk", "759a", 7, 9, True, False, _AL),
        _table("dirk", "s7511sal", 7, 11, True, True, _AL),
        _table("dirk", "8614a", 8, 14, True, False, _AL),
        _table("dirk", "8616sal", 8, 16, True, False, _AL),
        _table("dirk", "es8516sal", 8, 16, True, True, _AL),
        _own_dirk("sdirk2", 2, 2, False, "Alexander, SIAM J. Numer. Anal. 14 (1977), L-stable"),
        _own_dirk("kvaerno4", 4, 5, True, f"{_KVAERNO}, ESDIRK4/3 with local extrapolation"),
        _own_dirk("kvaerno5", 5, 7, True, f"{_KVAERNO}, ESDIRK5/4 with local extrapolation"),
        _irk("gauss4", 4, 2, False, _BUTCHER),
        _irk("gauss6", 6, 3, False, _BUTCHER),
        _irk("radau3", 3, 2, True, _EHLE),
        _irk("radau5", 5, 3, True, _EHLE),
        _forward_only(
            "bdf", "bdf", 2, 1, False, "Curtiss & Hirschfelder 1952; the order is PETSc's option ts_bdf_order"
        ),
        _forward_only("rosw", "2m", 2, 2, True, "PETSc TSROSW2M"),
        _forward_only("rosw", "2p", 2, 2, True, "PETSc TSROSW2P"),
        _forward_only("rosw", "ra3pw", 3, 3, True, _RANG),
        _forward_only("rosw", "ra34pw2", 3, 4, True, _RANG),
        _forward_only("rosw", "r34prw", 3, 4, True, _RANG15),
        _forward_only("rosw", "r3prl2", 3, 4, True, _RANG15),
        _forward_only("rosw", "rodas3", 3, 4, True, "Sandu et al., Atmos. Environ. 31 (1997)"),
        _forward_only("rosw", "rodaspr", 4, 6, True, _RANG15),
        _forward_only("rosw", "rodaspr2", 4, 6, True, _RANG15),
        _forward_only("rosw", "sandu3", 3, 3, True, "Sandu et al., Atmos. Environ. 31 (1997)"),
        _forward_only("rosw", "assp3p3s1c", 3, 3, True, "PETSc TSROSWASSP3P3S1C, Constantinescu"),
        _forward_only("rosw", "grk4t", 4, 4, True, f"Kaps & Rentrop 1979; {_HW}"),
        _forward_only("rosw", "shamp4", 4, 4, True, f"Shampine 1982; {_HW}"),
        _forward_only("rosw", "veldd4", 4, 4, True, f"van Veldhuizen 1984; {_HW}"),
        _forward_only("rosw", "4l", 4, 4, True, _HW),
        _forward_only("ssp", "rks2", 2, 5, False, "Ketcheson, SIAM J. Sci. Comput. 30 (2008)"),
        _forward_only("ssp", "rks3", 3, 9, False, "Ketcheson, SIAM J. Sci. Comput. 30 (2008)"),
        _forward_only("ssp", "rk104", 4, 10, False, "Ketcheson, SIAM J. Sci. Comput. 30 (2008)"),
        _symplectic("leapfrog", 2, 3, "Verlet, Phys. Rev. 159 (1967), kick-drift-kick"),
        _symplectic("yoshida4", 4, 7, _YOSHIDA),
        _symplectic("yoshida6", 6, 15, f"{_YOSHIDA}, solution A"),
    )
}

OTHER_NAMES = {"ssp22": "heun", "gauss2": "theta", "trbdf2": "dirk_es213sal", "kvaerno3": "dirk_es324sal"}
"""Further usual names of methods."""
_EXPLICIT = {method.petsc_name: method for method in METHODS.values() if method.family == "rk"}


def by_petsc_name(petsc_name: str) -> Method:
    """Return the method that TSRK calls `petsc_name`. Raises `ConfigurationError` if it is not in the table."""
    if petsc_name not in _EXPLICIT:
        raise ConfigurationError(f"ts_rk_type = {petsc_name!r}: must be one of {', '.join(_EXPLICIT)}")
    return _EXPLICIT[petsc_name]


def by_table(family: Family, petsc_name: str) -> Method:
    """Return the method of a family with PETSc's name of its table."""
    return next(method for method in METHODS.values() if (method.family, method.petsc_name) == (family, petsc_name))


def resolve(name: str) -> Method:
    """Return the method of a usual name (`rk4`, `cn`, `arkimex_3`) or of TSRK's own name (`4`).

    `rk4` is the classical method; torchdiffeq's `rk4` is Kutta's 3/8 rule, `rk4_38`.
    Raises `ConfigurationError` with the allowed names.
    """
    name = OTHER_NAMES.get(name, name)
    if name in METHODS:
        return METHODS[name]
    if name in _EXPLICIT:
        return _EXPLICIT[name]
    near = sorted(difflib.get_close_matches(str(name), [*METHODS, *_EXPLICIT, *OTHER_NAMES], n=2))
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    raise ConfigurationError(f"method = {name!r}{hint}: must be one of {_allowed()} (`pnode-dist methods` lists all)")


def _allowed() -> str:
    """Return all names in one line, with each family's tables after its name."""
    prefixed = [method for method in METHODS.values() if method.name.startswith(f"{method.family}_")]
    names = [method.name for method in METHODS.values() if method not in prefixed]
    names += [*OTHER_NAMES, *_EXPLICIT]
    for family in ("arkimex", "dirk", "rosw", "ssp"):
        tables = [method.petsc_name for method in prefixed if method.family == family]
        names.append(f"{family}_<{'|'.join(tables)}>")
    return ", ".join(names)


def adjoint_here(method: Method) -> str:
    """Return `method.adjoint`, or "refused: needs PETSc 3.26" where the installed PETSc is older than the adjoint."""
    floor = _missing_release(method.family)
    return method.adjoint if floor is None else f"refused: needs PETSc {floor}"


def has_adjoint(method: Method) -> bool:
    """Return True if the installed PETSc has an adjoint of `method`."""
    return adjoint_here(method) == "verified"


def gradient_refusal(method: Method) -> str | None:
    """Return the error message for a gradient of `method`, or None if the installed PETSc has an adjoint of it."""
    if has_adjoint(method):
        return None
    *families, last = (family for family in _WITH_ADJOINT if _missing_release(family) is None)
    instead = f"under torch.no_grad(), or choose a method of the families {', '.join(families)} or {last}"
    floor = _missing_release(method.family)
    if floor is None:
        return f"method = {method.name!r}: PETSc has no discrete adjoint of it: solve {instead}"
    needs = f"its gradient needs PETSc {floor} or newer and found {petsc4py_version()}"
    return f"method = {method.name!r}: {needs}: solve small systems with newton = 'batch', others {instead}"


def _missing_release(family: Family) -> str | None:
    """Return the PETSc that the adjoint of a family needs, if the installed one is older."""
    floor = ADJOINT_FLOORS.get(family)
    return None if floor is None or petsc_release() >= floor else ".".join(map(str, floor))
