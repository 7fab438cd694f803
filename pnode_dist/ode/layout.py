"""A state as the caller sees it (a tensor or a tuple of tensors) and as PETSc does (one local array of scalars)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

State = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class StateLayout:
    """Shapes and floating type of the parts of this rank's state. `is_tuple`: the caller works with a tuple."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    is_tuple: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of entries of each part."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """The number of entries on this rank."""
        return sum(self.sizes)

    def parts(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts as views of a flat tensor of `size` entries."""
        pieces = torch.split(flat, list(self.sizes))
        return tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))

    def as_state(self, parts: Sequence[torch.Tensor]) -> State:
        """The parts as the caller's kind of state."""
        return tuple(parts) if self.is_tuple else parts[0]


def layout_of(u0: State) -> tuple[StateLayout, tuple[torch.Tensor, ...]]:
    """The layout of an initial state, and its parts.

    Raises `TypeError` for anything but real floating-point CPU tensors of one type.
    """
    is_tuple = isinstance(u0, tuple | list)
    parts = tuple(u0) if isinstance(u0, tuple | list) else (u0,)
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"u0 must be a tensor or a tuple of tensors, got {type(u0).__name__}")
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"u0 must have one floating-point type, got {', '.join(sorted(str(d) for d in dtypes))}")
    devices = {part.device.type for part in parts}
    if devices != {"cpu"}:
        raise TypeError(f"u0 must be on the CPU, where PETSc's Vecs are, got {', '.join(sorted(devices))}")
    return StateLayout(tuple(tuple(part.shape) for part in parts), parts[0].dtype, is_tuple), parts
