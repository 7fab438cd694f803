"""The layout of a DMDA of PETSc, as arguments of a `GridPartition`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError

Rule = str | float
"""The name of a boundary rule, or the constant value beyond the boundary."""

_TYPES = PETSc.DM.BoundaryType
_NAMES = {_TYPES.NONE: "none", _TYPES.GHOSTED: "ghosted", _TYPES.MIRROR: "mirror", _TYPES.PERIODIC: "periodic"}
_RULES: dict[str, Rule] = {"none": "zero", "ghosted": "zero", "mirror": "reflect", "periodic": "periodic"}
_ON_THE_HOST = ("seq", "mpi", "shared")


@dataclass(frozen=True)
class DMDAFacts:
    """The layout of a DMDA. All sequences have an entry for each axis, in the order z, y, x.

    `types` are the names of PETSc's boundary types, `ownership` the points that the ranks along each axis own.
    """

    shape: tuple[int, ...]
    dof: int
    types: tuple[str, ...]
    width: int
    ownership: tuple[tuple[int, ...], ...]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The boundary rules that the types stand for, `zero` for those that stand for none."""
        return tuple(_RULES[name] for name in self.types)

    def checked(self, given: Rule | Sequence[Rule]) -> tuple[Rule, ...]:
        """Return `given` as a rule for each axis. Raises `ConfigurationError` if one contradicts the DMDA."""
        given = (given,) * len(self.shape) if isinstance(given, str | int | float) else tuple(given)
        if len(given) != len(self.shape):
            raise ConfigurationError(
                f"DMDA: boundary = {given!r}: must have one entry for each of {len(self.shape)} axes"
            )
        for axis, rule, name in zip("zyx"[-len(given) :], given, self.types, strict=True):
            allowed = _RULES[name] if name in ("periodic", "mirror") else None
            if (allowed is not None and rule != allowed) or (allowed is None and rule == "periodic"):
                raise ConfigurationError(
                    f"DMDA: boundary of {axis} = {rule!r}: the DMDA's is {name}, so it must be "
                    f"{repr(allowed) if allowed else 'a rule other than periodic'}"
                )
        return given


def facts_of(dmda: PETSc.DMDA) -> DMDAFacts:
    """Return the layout of a DMDA. Raises `ConfigurationError` for one that no `GridPartition` can follow.

    Collective on the DMDA.
    """
    if not isinstance(dmda, PETSc.DMDA) or dmda.getType() != PETSc.DM.Type.DA:
        kind = dmda.getType() if isinstance(dmda, PETSc.DM) else type(dmda).__name__
        raise ConfigurationError(f"DMDA: got {kind}: must be a DMDA of petsc4py that is set up")
    if min(dmda.getProcSizes()) < 1:
        raise ConfigurationError("DMDA: is not set up: call its setUp() first")
    vec = dmda.createGlobalVec()
    kind = vec.getType()
    vec.destroy()
    if kind not in _ON_THE_HOST:
        raise ConfigurationError(
            f"DMDA: Vecs of type {kind}: must be of {', '.join(_ON_THE_HOST)}, in the host's memory"
        )
    types = tuple(_NAMES.get(kind, "twist") for kind in reversed(dmda.getBoundaryType()))
    for axis, name in zip("zyx"[-len(types) :], types, strict=True):
        if name not in _RULES:
            raise ConfigurationError(f"DMDA: boundary type of {axis} = {name}: must be one of {', '.join(_RULES)}")
    return DMDAFacts(
        shape=tuple(reversed(dmda.getSizes())),
        dof=dmda.getDof(),
        types=types,
        width=dmda.getStencilWidth(),
        ownership=tuple(tuple(map(int, parts)) for parts in reversed(dmda.getOwnershipRanges())),
    )


def check_ranks(dmda: PETSc.DMDA, comm: MPI.Comm) -> None:
    """Raise `ConfigurationError` unless a DMDA is spread over the ranks of `comm`, in their order."""
    own: MPI.Comm = dmda.getComm().tompi4py()
    if MPI.Comm.Compare(own, comm) not in (MPI.IDENT, MPI.CONGRUENT):
        raise ConfigurationError(
            f"DMDA: is spread over {own.size} rank(s), and the mesh's state over {comm.size}: must be over the same "
            "ranks in the same order"
        )
