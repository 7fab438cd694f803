"""The current state of a stepper: a PETSc Vec if PETSc takes the steps, else tensors."""

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
    """This rank's part of the current state, in `StateLayout.state_dtype`. All views of it are read-only."""

    @property
    def parts(self) -> Parts:
        """The parts of the state."""
        ...

    @property
    def flat(self) -> torch.Tensor:
        """All entries in one flat tensor; a copy if they are not contiguous."""
        ...

    @property
    def array(self) -> Array:
        """All entries in one flat NumPy array."""
        ...

    def set(self, parts: Parts) -> None:
        """Replace the state. `parts` must not be written to until the state is replaced again."""
        ...

    def set_flat(self, flat: torch.Tensor) -> None:
        """Replace the state by a copy of a flat tensor."""
        ...

    def overwrite(self, write: Callable[[Array], None]) -> None:
        """Replace the state by calling `write` with an array to fill."""
        ...

    def take(self) -> Parts:
        """Return the parts, in the caller's type and in memory that the caller owns. No state is left."""
        ...

    def release(self) -> None:
        """Free memory that can be allocated again. No state is left until the next `set`."""
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
        """See `CurrentState.set`: copies the parts."""
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
        """See `CurrentState.take`: returns copies, because PETSc keeps the Vec."""
        return tuple(part.to(self._layout.device, self._layout.dtype, copy=True) for part in self.parts)

    def release(self) -> None:
        """See `CurrentState.release`: frees nothing, because PETSc keeps the Vec."""

    def destroy(self) -> None:
        """Destroy the Vec. No state is left. Collective."""
        self.flat, self.parts = torch.empty(0), ()
        self.vec.destroy()

    def written(self) -> None:
        """Notify PETSc of a write to the Vec through `flat` or `parts`."""
        vectors.wrote(self.vec, self._layout.vec_device)


class TensorState:
    """The current state as tensors, which a tape or the caller may share.

    Shared tensors are never written to: the next state is put into new memory. The initial state of a solve is shared
    with the caller, and is not copied. The parts lie in one flat tensor until they are shared. After that each part has
    memory of its own, so that a part on a tape does not keep the other parts alive.
    """

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout
        self._dtype = layout.state_dtype
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
        """Mark `parts` as shared: they are not written to from now on."""
        self._shared = self._separate = True

    def set_shared(self, parts: Parts) -> None:
        """Replace the state by shared parts, in the layout's `state_dtype`."""
        self.parts, self._shared, self._separate = parts, True, True
        self._flat = parts[0].view(-1) if len(parts) == 1 else None

    def unshare(self) -> None:
        """Mark `parts` as no longer shared."""
        self._shared = False

    def set(self, parts: Parts) -> None:
        """See `CurrentState.set`: shares the parts, and copies them only to convert them."""
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
        """Add weighted slopes to the state, at least one, one after the other."""
        before = self.parts
        self._own(in_a_row=not self._separate)
        for number, (start, part) in enumerate(zip(before, self.parts, strict=True)):
            for slopes, weight in terms:
                torch.add(start, slopes[number], alpha=weight, out=part)
                start = part

    def take(self) -> Parts:
        """See `CurrentState.take`."""
        layout, parts = self._layout, self.parts
        # A caller could not write into views of one tensor.
        copied = self._shared or (len(parts) > 1 and self._flat is not None)
        taken = tuple(part.to(layout.device, layout.dtype, copy=copied) for part in parts)
        self.release()
        return taken

    def release(self) -> None:
        """See `CurrentState.release`."""
        self.parts, self._flat, self._shared, self._separate = (), None, False, False

    def _can_borrow(self, part: torch.Tensor) -> bool:
        # A tensor of inference mode has no version, so a write by f could not be detected.
        return (
            part.dtype is self._dtype
            and part.device == self._layout.vec_device
            and part.is_contiguous()
            and not part.is_inference()
        )

    def _own(self, in_a_row: bool) -> None:
        """Allocate memory that is not shared, with undefined contents, unless the state is already in such memory."""
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
    """NumPy access to a flat tensor: to its memory, or through a copy on the host if it is on a device."""

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
