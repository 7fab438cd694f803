"""Conditions beside f = 0: known solutions to stay away from, and phases that single out one of many solutions.

P. E. Farrell, A. Birkisson, S. W. Funke: Deflation techniques for finding distinct solutions of nonlinear partial
differential equations, SIAM J. Sci. Comput. 37 (2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.rhs.layout import StateLayout

_DEPENDENT = 1e-10
"""Vectors are dependent if one is so much shorter than 1 after the others are taken out of it, all scaled to 1."""


def sums(comm: MPI.Comm, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a small tensor over all ranks. Collective."""
    if comm.size == 1:
        return values
    total = values.reshape(-1).clone()
    comm.Allreduce(MPI.IN_PLACE, total.numpy())
    return total.view(values.shape)


def flat_states(name: str, given: Any, layout: StateLayout) -> torch.Tensor:
    """Return states like u0 as rows `[state, entry]` of the type of the solve; `given` is one, or several.

    Raises `ConfigurationError` for anything else.
    """
    if not isinstance(given, torch.Tensor | tuple | list):
        raise ConfigurationError(f"{name} = {given!r}: must be a state like u0, or a sequence of such states")
    one = isinstance(given, torch.Tensor) or (
        layout.is_tuple and len(given) > 0 and all(isinstance(part, torch.Tensor) for part in given)
    )
    rows = []
    for number, state in enumerate((given,) if one else given):
        parts = tuple(state) if isinstance(state, tuple | list) else (state,)
        shapes = [tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
        if shapes != list(layout.shapes) or isinstance(state, tuple | list) != layout.is_tuple:
            words = ", ".join(map(str, shapes))
            raise ConfigurationError(
                f"{name}[{number}]: has {words}: must be a state like u0, {', '.join(map(str, layout.shapes))}"
            )
        rows.append(torch.cat([layout.scalar(part.detach()).reshape(-1) for part in parts]))
    return torch.stack(rows) if rows else torch.empty(0, layout.size, dtype=layout.state_dtype)


@dataclass(frozen=True)
class Phase:
    """The conditions <v, u - u0> = 0 for each row v of `vectors` `[condition, entry]`, which are orthonormal.

    They replace the components of f along v, so the equations are as many as before. `start` is u0, flat.
    """

    comm: MPI.Comm
    vectors: torch.Tensor
    start: torch.Tensor

    def along(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the components of a flat state along the vectors. Collective."""
        return sums(self.comm, self.vectors @ flat)

    def combined(self, components: torch.Tensor) -> torch.Tensor:
        """Return the sum of the vectors times `components`, as a flat state."""
        return components @ self.vectors

    def projected(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a flat state without its components along the vectors. Collective."""
        return flat - self.combined(self.along(flat))


def phase_of(comm: MPI.Comm, vectors: torch.Tensor, start: torch.Tensor) -> Phase | None:
    """Return the phase conditions of the rows of `vectors`, None if there are none. Collective.

    Raises `ConfigurationError` on all ranks if they are dependent.
    """
    if not len(vectors):
        return None
    rows: list[torch.Tensor] = []
    for number, vector in enumerate(vectors):
        length = math.sqrt(float(sums(comm, vector @ vector)))
        left = vector / length if 0 < length < math.inf else torch.zeros_like(vector)
        # Twice is enough: rounding spoils a single pass for nearly dependent vectors.
        for _ in range(2 if rows else 0):
            basis = torch.stack(rows)
            left = left - sums(comm, basis @ left) @ basis
        rest = math.sqrt(float(sums(comm, left @ left)))
        if not rest > _DEPENDENT:
            raise ConfigurationError(
                f"phase[{number}]: must be finite, not zero, and no combination of the vectors before it"
            )
        rows.append(left / rest)
    return Phase(comm, torch.stack(rows), start)


@dataclass(frozen=True)
class Deflation:
    """The factor M(u) = prod_r (1 / |u - r|^2 + 1) over the known solutions r, the rows of `known`.

    |.| is the root mean square over the `entries` of the state on all ranks, so that the factor of a field does not
    depend on its resolution. M grows without bound near a known solution, and is near 1 far from all.
    """

    comm: MPI.Comm
    known: torch.Tensor
    entries: int

    def squares(self, flat: torch.Tensor) -> torch.Tensor:
        """Return |u - r|^2 for each known solution. Collective."""
        return sums(self.comm, (flat - self.known).square().sum(1)) / self.entries

    def factor(self, flat: torch.Tensor) -> float:
        """Return M(u). Collective."""
        return float((1 / self.squares(flat) + 1).prod())

    def factor_and_gradient(self, flat: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return M(u), and this rank's part of its gradient. Collective."""
        squares = self.squares(flat)
        factors = 1 / squares + 1
        factor = factors.prod()
        weights = -2 * factor / (factors * squares.square() * self.entries)
        return float(factor), weights @ (flat - self.known)


def deflation_of(comm: MPI.Comm, known: torch.Tensor, start: torch.Tensor) -> Deflation | None:
    """Return the deflation of the rows of `known`, None if there are none. Collective.

    Raises `ConfigurationError` on all ranks if u0, flat in `start`, is one of them.
    """
    if not len(known):
        return None
    entries = int(sums(comm, torch.tensor([start.numel()], dtype=torch.float64)))
    deflation = Deflation(comm, known, entries)
    for number, square in enumerate(deflation.squares(start).tolist()):
        if not 0 < square < math.inf:
            raise ConfigurationError(
                f"deflate[{number}]: is u0 itself, or not finite: must be finite; start from another u0"
            )
    return deflation
