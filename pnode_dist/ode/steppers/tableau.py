"""The coefficients of explicit Runge-Kutta methods, as PETSc has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from petsc4py import PETSc

from pnode_dist.petsc import calls

Terms = tuple[tuple[int, float], ...]
"""Numbers of stages and their coefficients, those that are zero left out."""


@dataclass(frozen=True)
class Tableau:
    """k_i = f(t + c_i h, u + h sum_j a_ij k_j), and u + h sum_i b_i k_i is the step's result."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    @cached_property
    def stage_terms(self) -> tuple[Terms, ...]:
        """For each stage, what it is made of: the earlier stages in order."""
        return tuple(_terms(row) for row in self.a)

    @cached_property
    def result_terms(self) -> Terms:
        """What the result is made of."""
        return _terms(self.b)

    @cached_property
    def uses(self) -> tuple[Terms, ...]:
        """For each stage, the later stages that it goes into."""
        return tuple(_terms([row[stage] for row in self.a]) for stage in range(len(self.b)))

    @cached_property
    def last_uses(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the earlier ones that go into it but into none after it that the result depends on."""
        ends = [
            max((later for later, _ in self.uses[stage] if self.counts[later]), default=stage)
            for stage in range(len(self.b))
        ]
        return tuple(tuple(stage for stage in range(number) if ends[stage] == number) for number in range(len(self.b)))

    @cached_property
    def counts(self) -> tuple[bool, ...]:
        """For each stage, whether the result depends on it. What does not only serves the estimate of an error."""
        found: dict[int, bool] = {}
        for stage in reversed(range(len(self.b))):
            found[stage] = self.b[stage] != 0 or any(found[later] for later, _ in self.uses[stage])
        return tuple(found[stage] for stage in range(len(self.b)))


def tableau_of(ts: PETSc.TS) -> Tableau:
    """That of a TS of type `rk`."""
    return Tableau(*calls.runge_kutta_tableau(ts))


def _terms(coefficients: tuple[float, ...] | list[float]) -> Terms:
    return tuple((stage, value) for stage, value in enumerate(coefficients) if value)
