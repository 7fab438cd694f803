"""The layout of a state: a tensor or a tuple of tensors for the caller, one local array of scalars for a solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, reduce
from typing import Any

import numpy as np
import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method
from pnode_dist.petsc import vectors

STATE_TYPES = (torch.float32, torch.float64)
State = torch.Tensor | tuple[torch.Tensor, ...]
Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class StateLayout:
    """The shapes of the parts of this rank's state, and their type. `is_tuple`: the caller's state is a tuple.

    `dtype` and `device` are those of the caller's tensors. f computes on that device, in `compute_dtype`. The state of
    the solve, its adjoint and its checkpoints are of `state_dtype` on `vec_device`, the device of PETSc's vectors.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    is_tuple: bool
    compute_dtype: torch.dtype
    device: torch.device = vectors.HOST
    vec_device: torch.device = vectors.HOST
    state_dtype: torch.dtype = field(default_factory=vectors.scalar_dtype)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of entries of each part."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """The number of entries on this rank."""
        return sum(self.sizes)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """`state_dtype` as NumPy's type, which is that of the state's arrays."""
        return torch.empty(0, dtype=self.state_dtype).numpy().dtype

    @cached_property
    def converts(self) -> bool:
        """True if f's tensors differ from the state of the solve in floating type or device."""
        return self.compute_dtype != self.state_dtype or self.device != self.vec_device

    def parts(self, flat: torch.Tensor) -> Parts:
        """Return the parts as views of a flat tensor of `size` entries."""
        pieces = torch.split(flat, list(self.sizes))
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def inputs(self, parts: Parts, copy: bool = False) -> Parts:
        """Convert parts to f's type and device. Returns the same tensors if they need no conversion, unless `copy`."""
        return tuple(part.to(self.device, self.compute_dtype, copy=copy) for part in parts)

    def scalar(self, value: torch.Tensor) -> torch.Tensor:
        """Convert a result of f to the type and device of the state of the solve: the reverse of `inputs`."""
        return value.to(self.vec_device, self.state_dtype)

    def as_state(self, parts: Sequence[torch.Tensor]) -> State:
        """Return the parts as a state of the caller's: a tensor or a tuple."""
        return tuple(parts) if self.is_tuple else parts[0]


def layout_of(u0: State, compute_dtype: torch.dtype | None = None) -> tuple[StateLayout, Parts]:
    """Return the layout of an initial state, and its parts. f computes in the state's type by default.

    Raises `TypeError` for anything but real floating-point tensors of one type on one device that have values, and
    `ConfigurationError` for a `compute_dtype` that is not a real floating type.
    """
    is_tuple = isinstance(u0, tuple | list)
    parts = tuple(u0) if isinstance(u0, tuple | list) else (u0,)
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"u0 must be a tensor or a tuple of tensors, got {type(u0).__name__}")
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"u0 must have one floating-point type, got {', '.join(sorted(str(d) for d in dtypes))}")
    devices = {part.device for part in parts}
    if len(devices) > 1 or parts[0].is_meta:
        places = ", ".join(sorted(str(device) for device in devices))
        raise TypeError(f"u0 must be on one device that keeps values, got {places}")
    if compute_dtype is not None and not (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        raise ConfigurationError(
            f"compute_dtype = {compute_dtype!r}: must be a real floating type of torch, such as torch.float32"
        )
    dtype = parts[0].dtype
    shapes = tuple(tuple(part.shape) for part in parts)
    return _interned(shapes, dtype, is_tuple, compute_dtype or dtype, parts[0].device), parts


def for_method(layout: StateLayout, method: Method, state_dtype: torch.dtype | None) -> StateLayout:
    """Return the layout for a solve by `method`, with its state in `state_dtype`, or in the default of the method.

    Methods whose state is a PETSc Vec have PETSc's scalar type. The default of the others is the wider type of u0 and
    f, and at least float32. Raises `ConfigurationError` for a type that the method cannot have.
    """
    if state_dtype is not None and not any(state_dtype is known for known in STATE_TYPES):
        raise ConfigurationError(
            f"state_dtype = {state_dtype!r}: must be {', '.join(map(str, STATE_TYPES))}, or None for the default"
        )
    scalar = vectors.scalar_dtype()
    if method.has_vec_state:
        if state_dtype not in (None, scalar):
            raise ConfigurationError(
                f"state_dtype = {state_dtype}: method = {method.name!r} has its state in PETSc's vectors: must be "
                f"{scalar} or None"
            )
        state_dtype = scalar
    if state_dtype is None:
        state_dtype = reduce(torch.promote_types, (layout.dtype, layout.compute_dtype, torch.float32))
    device = vectors.HOST if method.implicit else vectors.vec_device(layout.device)
    return _with_state(layout, state_dtype, device)


@lru_cache(maxsize=256)
def _with_state(layout: StateLayout, state_dtype: torch.dtype, device: torch.device) -> StateLayout:
    return replace(layout, state_dtype=state_dtype, vec_device=device)


@lru_cache(maxsize=256)
def _interned(*values: Any) -> StateLayout:
    """Return the layout of these values. States of the same form share one, with its cached properties."""
    return StateLayout(*values)
