"""The state that a stepper is at: in PETSc's memory where PETSc takes the steps, else in torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.petsc import vectors

Array = np.ndarray[Any, Any]


class CurrentState(Protocol):
    """This rank's part of the current state, in PETSc's scalar type; what it gives out is to be read alone."""

    @property
    def parts(self) -> Parts:
        """The parts of the state."""
        ...

    @property
    def flat(self) -> torch.Tensor:
        """All of its entries in a row; a copy if they do not lie in one."""
        ...

    @property
    def array(self) -> Array:
        """The same for NumPy."""
        ...

    def set(self, parts: Parts) -> None:
        """Put another state in its place. Nobody may write into `parts` until the next one is there."""
        ...

    def set_flat(self, flat: torch.Tensor) -> None:
        """Copy another state into it, given in a row."""
        ...

    def overwrite(self, write: Callable[[Array], None]) -> None:
        """Let `write` fill an array with another state."""
        ...

    def take(self) -> Parts:
        """The parts in memory that is the caller's from now on, in the caller's type; there is no state after that."""
        ...

    def release(self) -> None:
        """Give up memory that can be had again: there is no state until the next is put in place."""
        ...


class VecState:
    """The current state as the memory of a PETSc Vec. Collective on `comm`."""

    def __init__(self, comm: MPI.Comm, layout: StateLayout) -> None:
        self._layout = layout
        self.vec = vectors.create_vec(comm, layout.size, layout.vec_device)
        self.flat = vectors.view(self.vec, (layout.size,), layout.vec_device)
        self.parts = layout.parts(self.flat)
        self._host = _Host(layout)

    @property
    def array(self) -> Array:
        """See `CurrentState.array`."""
        return self._host.read(self.flat)

    def set(self, parts: Parts) -> None:
        """See `CurrentState.set`: they are copied."""
        for target, part in zip(self.parts, parts, strict=True):
            target.copy_(part)
        self.written()

    def set_flat(self, flat: torch.Tensor) -> None:
        """See `CurrentState.set_flat`."""
        self.flat.copy_(flat)
        self.written()

    def overwrite(self, write: Callable[[Array], None]) -> None:
        """See `CurrentState.overwrite`."""
        self._host.write(self.flat, write)
        self.written()

    def take(self) -> Parts:
        """See `CurrentState.take`: PETSc holds on to the Vec, copies are taken."""
        return tuple(part.to(self._layout.device, self._layout.dtype, copy=True) for part in self.parts)

    def release(self) -> None:
        """See `CurrentState.release`: PETSc holds on to the Vec."""

    def destroy(self) -> None:
        """Destroy the Vec: there is no state after that. Collective."""
        self.flat, self.parts = torch.empty(0), ()
        self.vec.destroy()

    def written(self) -> None:
        """Say that the Vec was written to through `flat` or `parts`."""
        vectors.wrote(self.vec, self._layout.vec_device)


class TensorState:
    """The current state as tensors, which others may hold on to: then it goes on in memory of its own.

    `share` says that they do. The state that a solve starts from is the caller's, and is not copied. The parts lie in a
    row until somebody holds on to them: one that is held would keep the others' memory as well.
    """

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout
        self._dtype = vectors.scalar_dtype()
        self._host = _Host(layout)
        self.parts: Parts = ()
        self._flat: torch.Tensor | None = None
        self._shared = self._separate = False

    @property
    def flat(self) -> torch.Tensor:
        """See `CurrentState.flat`."""
        if self._flat is None:
            return torch.cat([part.view(-1) for part in self.parts])
        return self._flat

    @property
    def array(self) -> Array:
        """See `CurrentState.array`."""
        return self._host.read(self.flat)

    def share(self) -> None:
        """Know that somebody holds on to `parts`: they stay as they are from now on."""
        self._shared = self._separate = True

    def set_shared(self, parts: Parts) -> None:
        """Put another state in its place that somebody holds on to, in PETSc's scalar type."""
        self.parts, self._shared, self._separate = parts, True, True
        self._flat = parts[0].view(-1) if len(parts) == 1 else None

    def unshare(self) -> None:
        """Know that nobody else holds on to `parts` any more."""
        self._shared = False

    def set(self, parts: Parts) -> None:
        """See `CurrentState.set`: not copied unless they have to be converted."""
        if all(map(self._can_borrow, parts)):
            self.parts, self._shared, self._separate = tuple(part.detach() for part in parts), True, False
            self._flat = self.parts[0].view(-1) if len(parts) == 1 else None
            return
        self._separate = False
        self._own(in_a_row=True)
        for target, part in zip(self.parts, parts, strict=True):
            target.copy_(part)

    def set_flat(self, flat: torch.Tensor) -> None:
        """See `CurrentState.set_flat`."""
        self._own(in_a_row=True)
        self.flat.copy_(flat)

    def overwrite(self, write: Callable[[Array], None]) -> None:
        """See `CurrentState.overwrite`."""
        self._own(in_a_row=True)
        self._host.write(self.flat, write)

    def add(self, terms: Sequence[tuple[Parts, float]]) -> None:
        """Add multiples of slopes, one after the other, at least one."""
        before = self.parts
        self._own(in_a_row=not self._separate)
        for number, (start, part) in enumerate(zip(before, self.parts, strict=True)):
            for slopes, weight in terms:
                torch.add(start, slopes[number], alpha=weight, out=part)
                start = part

    def take(self) -> Parts:
        """See `CurrentState.take`."""
        layout, parts = self._layout, self.parts
        # Views of one tensor are not what a caller could write into.
        copied = self._shared or (len(parts) > 1 and self._flat is not None)
        taken = tuple(part.to(layout.device, layout.dtype, copy=copied) for part in parts)
        self.release()
        return taken

    def release(self) -> None:
        """See `CurrentState.release`."""
        self.parts, self._flat, self._shared, self._separate = (), None, False, False

    def _can_borrow(self, part: torch.Tensor) -> bool:
        # Without a version there is no telling whether f writes into it.
        return (
            part.dtype is self._dtype
            and part.device == self._layout.vec_device
            and part.is_contiguous()
            and not part.is_inference()
        )

    def _own(self, in_a_row: bool) -> None:
        """Have memory that nobody else knows of, with any contents if there was none."""
        if self.parts and not self._shared and (self._flat is not None or not in_a_row):
            return
        layout = self._layout
        empty = partial(torch.empty, dtype=self._dtype, device=layout.vec_device)
        if in_a_row and len(layout.shapes) > 1:
            self._flat = empty(layout.size)
            self.parts = layout.parts(self._flat)
        else:
            self.parts = tuple(map(empty, layout.shapes))
            self._flat = self.parts[0].view(-1) if len(layout.shapes) == 1 else None
        self._shared = False


class _Host:
    """Tensors for NumPy: their own memory, or that of the host where they are on a device."""

    def __init__(self, layout: StateLayout) -> None:
        self._size, self._device = layout.size, layout.vec_device
        self._copy: torch.Tensor | None = None

    def read(self, flat: torch.Tensor) -> Array:
        if self._device is vectors.HOST:
            return flat.numpy()
        return self._staging(flat).copy_(flat).numpy()

    def write(self, flat: torch.Tensor, write: Callable[[Array], None]) -> None:
        if self._device is vectors.HOST:
            write(flat.numpy())
            return
        staging = self._staging(flat)
        write(staging.numpy())
        flat.copy_(staging)

    def _staging(self, flat: torch.Tensor) -> torch.Tensor:
        if self._copy is None:
            pinned = self._device.type == "cuda"
            self._copy = torch.empty(self._size, dtype=flat.dtype, pin_memory=pinned)
        return self._copy
