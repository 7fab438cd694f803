"""Explicit Runge-Kutta methods that PETSc lacks, added to its TSRK when the first explicit stepper is made.

They are the methods of torchdiffeq that PETSc does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from pnode_dist.ode.methods import by_petsc_name
from pnode_dist.petsc import calls


@dataclass(frozen=True)
class OwnTable:
    """The coefficients of a method as text: rows of the lower triangle separated by semicolons, and the weights.

    The entries are fractions. The nodes are the sums of the rows. `embedded` is None without an error estimate.
    """

    rows: str
    weights: str
    embedded: str | None = None


# Keys are the names in PETSc, as `Method.petsc_name`.
OWN_TABLES = {
    "2f": OwnTable("1/2 ; 1/256 255/256", weights="1/512 255/256 1/512", embedded="1/256 255/256 0"),
    "3h": OwnTable("1/3 ; 0 2/3", weights="1/4 0 3/4"),
    "4k": OwnTable("1/3 ; -1/3 1 ; 1 -1 1", weights="1/8 3/8 3/8 1/8"),
    "8dp": OwnTable(
        """
        1/18 ;
        1/48 1/16 ;
        1/32 0 3/32 ;
        5/16 0 -75/64 75/64 ;
        3/80 0 0 3/16 3/20 ;
        29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000 ;
        16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229 -180193667/1043307555 ;
        39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059 790204164/839813087
        800635310/3783071287 ;
        246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935
        6005943493/2108947869 393006217/1396673457 123872331/1001029789 ;
        -1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382
        -48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653 ;
        185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211
        5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418 65686358/487910083 ;
        403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604
        11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525
        248638103/1413531060 0
        """,
        weights="""
        14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732
        -1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4
        """,
        embedded="""
        13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 656045339/265891186
        -3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0
        """,
    ),
}


@cache
def register_own_tables() -> None:
    """Add all own tables to TSRK. Not collective."""
    for name, table in OWN_TABLES.items():
        weights = _fractions(table.weights)
        rows = [_fractions(row) for row in ("", *table.rows.split(";"))]
        padded = tuple(_floats([*row, *(Fraction(0),) * (len(weights) - len(row))]) for row in rows)
        nodes = _floats([sum(row, Fraction(0)) for row in rows])
        embedded = None if table.embedded is None else _floats(_fractions(table.embedded))
        calls.register_runge_kutta(name, by_petsc_name(name).order, padded, _floats(weights), nodes, embedded)


def _fractions(text: str) -> list[Fraction]:
    return [Fraction(entry) for entry in text.split()]


def _floats(entries: list[Fraction]) -> tuple[float, ...]:
    return tuple(map(float, entries))
