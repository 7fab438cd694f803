"""The choice of the solver of the equations of implicit steps: a batch of small systems, or PETSc."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.tangent import WithTangent
from pnode_dist.ode.solver_key import matrices_of
from pnode_dist.ode.steppers.batched_samples import split_of
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.partition.protocol import Partition

CHOICES = ("auto", "batch", "petsc")
MOST_COMPONENTS = 48
"""Larger samples are solved by PETSc: in a large batch their dense blocks cost more than its iterations."""
_MOST_ENTRIES = 2**24
_ITS_OPTIONS = {"snes_rtol", "snes_atol", "snes_stol", "snes_max_it"}
_ITS_OPTIONS |= {"ts_theta_theta", "ts_theta_endpoint", "ts_arkimex_type", "ts_dirk_type"}
_OF_SOLVERS = re.compile(r"(ts|snes|ksp|pc|sub|mg|fieldsplit)_")


def chosen_newton(
    wanted: str,
    method: Method,
    layout: StateLayout,
    partition: Partition | None,
    func: Any,
    mass: Any,
    preconditioner: Any,
    options: Mapping[str, Any],
    adaptive: bool,
) -> str:
    """Return "batch" or "petsc" for the keyword `newton`, which is "auto", "batch" or "petsc". Not collective.

    Raises `ConfigurationError` for another value, and for "batch" where it is impossible.
    """
    if wanted not in CHOICES:
        raise ConfigurationError(f"newton = {wanted!r}: must be one of {', '.join(CHOICES)}")
    if not method.implicit:
        if wanted != "auto":
            raise ConfigurationError(
                f"newton = {wanted!r}: method = {method.name!r} is explicit and solves no equations: must be 'auto'"
            )
        return "petsc"
    if wanted == "petsc":
        return "petsc"
    obstacle = _obstacle(method, layout, partition, func, mass, preconditioner, options, adaptive)
    if obstacle is None:
        return "batch"
    if wanted == "auto" or isinstance(func, WithTangent):
        return "petsc"
    raise ConfigurationError(f"newton = 'batch': {obstacle}: must be 'auto' or 'petsc'")


def _obstacle(
    method: Method,
    layout: StateLayout,
    partition: Partition | None,
    func: Any,
    mass: Any,
    preconditioner: Any,
    options: Mapping[str, Any],
    adaptive: bool,
) -> str | None:
    """Return the reason why the equations cannot be solved as a batch; None if they can."""
    if method.family not in ("theta", "arkimex", "dirk", "irk"):
        return f"method = {method.name!r} is not of the families theta, arkimex, dirk or irk"
    if adaptive:
        return "steps with error control (rtol, atol) are PETSc's"
    if preconditioner is not None:
        return "a preconditioner is for PETSc's linear solvers"
    if partition is not None and not isinstance(partition, BatchPartition):
        return f"a {type(partition).__name__} divides systems between ranks"
    if matrices_of(func):
        return "a part of func is a PETSc.Mat"
    if isinstance(func, WithTangent):
        return "tangents are solved with PETSc"
    masses = mass if isinstance(mass, tuple | list) else (mass,)
    if any(isinstance(part, PETSc.Mat) for part in masses):
        return "mass is a PETSc.Mat"
    if mass is not None and method.family not in ("theta", "irk"):
        return f"method = {method.name!r} takes no mass matrix"
    if layout.compute_dtype not in (torch.float32, torch.float64):
        return f"f computes in {layout.compute_dtype}, too coarse to tell samples apart"
    samples, widths = split_of(layout, partition)
    components = sum(widths)
    if mass is not None and samples > 1 and any(len(shape) == 1 for shape in layout.shapes):
        return "mass acts on the first axis of the state, which counts samples"
    if not 1 <= components <= MOST_COMPONENTS:
        return f"a sample has {components} components: must be 1 to {MOST_COMPONENTS}"
    if partition is not None:
        if any(shape[:1] != partition.local_shape[:1] for shape in layout.shapes):
            return "the first axis of the state is not that of the partition's samples"
        samples = -(-partition.global_shape[0] // partition.comm.size)
    # The blocks of a fully implicit method have a row for each component of each stage.
    rows = components * (method.stages if method.family == "irk" else 1)
    if samples * rows**2 > _MOST_ENTRIES:
        return f"{samples} samples of {rows} unknowns need more than {_MOST_ENTRIES} entries of blocks"
    given = [name.removeprefix("-") for name in options]
    given += [name for name in PETSc.Options().getAll() if _OF_SOLVERS.match(name)]
    others = sorted(set(given) - _ITS_OPTIONS)
    return f"options of PETSc's solvers are given ({', '.join(others)})" if others else None
