"""The coefficients of explicit Runge-Kutta methods, from the tables of PETSc's TSRK."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from petsc4py import PETSc

from pnode_dist.ode.steppers.own_tables import second_embedded
from pnode_dist.petsc import calls

Terms = tuple[tuple[int, float], ...]
"""Pairs of a stage and its coefficient, without zero coefficients."""


@dataclass(frozen=True)
class Tableau:
    """The method k_i = f(t + c_i h, u + h sum_j a_ij k_j), with the result u + h sum_i b_i k_i.

    `embedded` are the weights of the embedded method; None for a method without an error estimate. DOP853 has a
    `second_embedded` method of lower order, whose estimate corrects the first.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    embedded: tuple[float, ...] | None = None
    second_embedded: tuple[float, ...] | None = None

    @cached_property
    def stage_terms(self) -> tuple[Terms, ...]:
        """For each stage, the earlier stages that it uses, in order."""
        return tuple(_terms(row) for row in self.a)

    @cached_property
    def result_terms(self) -> Terms:
        """The stages that the result uses, in order."""
        return _terms(self.b)

    @cached_property
    def error_terms(self) -> Terms:
        """The stages that the error estimate uses, in order: the result minus that of the embedded method.

        Empty for a method without an error estimate.
        """
        return self._difference(self.embedded)

    @cached_property
    def second_error_terms(self) -> Terms:
        """The same for the second embedded method; empty if there is none."""
        return self._difference(self.second_embedded)

    def _difference(self, embedded: tuple[float, ...] | None) -> Terms:
        return _terms([weight - other for weight, other in zip(self.b, embedded or self.b, strict=True)])

    @cached_property
    def uses(self) -> tuple[Terms, ...]:
        """For each stage, the later stages that use it."""
        return tuple(_terms([row[stage] for row in self.a]) for stage in range(len(self.b)))

    @cached_property
    def last_uses(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the earlier stages whose last use it is, among stages that the result depends on."""
        ends = [
            max((later for later, _ in self.uses[stage] if self.counts[later]), default=stage)
            for stage in range(len(self.b))
        ]
        return tuple(tuple(stage for stage in range(number) if ends[stage] == number) for number in range(len(self.b)))

    @cached_property
    def counts(self) -> tuple[bool, ...]:
        """For each stage, True if the result depends on it. The others serve the error estimate alone."""
        found: dict[int, bool] = {}
        for stage in reversed(range(len(self.b))):
            found[stage] = self.b[stage] != 0 or any(found[later] for later, _ in self.uses[stage])
        return tuple(found[stage] for stage in range(len(self.b)))


def tableau_of(ts: PETSc.TS) -> Tableau:
    """Return the tableau of a TS of type `rk`."""
    return Tableau(*calls.runge_kutta_tableau(ts), second_embedded(ts.getRKType()))


def _terms(coefficients: tuple[float, ...] | list[float]) -> Terms:
    return tuple((stage, value) for stage, value in enumerate(coefficients) if value)
