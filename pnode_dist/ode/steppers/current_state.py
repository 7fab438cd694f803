"""The current state of a stepper: a PETSc Vec if PETSc takes the steps, else tensors."""

from __future__ import annotations

from collections.abc import Callable
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

    def kept(self) -> Parts:
        """Return the parts as tensors that later states leave as they are."""
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

    def kept(self) -> Parts:
        """See `CurrentState.kept`: returns copies, because PETSc writes to the Vec."""
        return tuple(part.clone() for part in self.parts)

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
    """The current state as tensors, which a tape or the caller may share: they are replaced, never written to.

    The initial state of a solve is shared with the caller, and is not copied.
    """

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout
        self._host = _Host(layout)
        self.parts: Parts = ()
        self._shared = False

    @property
    def flat(self) -> torch.Tensor:
        """See `CurrentState.flat`."""
        parts = self.parts
        return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])

    @property
    def array(self) -> Array:
        """See `CurrentState.array`."""
        return self._host.read(self.flat)

    def replace(self, parts: Parts, shared: bool) -> None:
        """Replace the state by parts in the layout's `state_dtype`. `shared`: a tape uses them as well."""
        self.parts, self._shared = parts, shared

    def set(self, parts: Parts) -> None:
        """See `CurrentState.set`: shares the parts, and copies them only to convert them."""
        if all(map(self._can_borrow, parts)):
            self.replace(tuple(part.detach() for part in parts), shared=True)
            return
        self._own()
        for target, part in zip(self.parts, parts, strict=True):
            target.copy_(part)

    def set_flat(self, flat: torch.Tensor) -> None:
        """See `CurrentState.set_flat`."""
        self._own().copy_(flat)

    def overwrite(self, write: Callable[[Array], None]) -> None:
        """See `CurrentState.overwrite`."""
        self._host.write(self._own(), write)

    def kept(self) -> Parts:
        """See `CurrentState.kept`: the parts themselves, which are replaced and never written to."""
        self._shared = True
        return self.parts

    def take(self) -> Parts:
        """See `CurrentState.take`."""
        layout, parts = self._layout, self.parts
        taken = tuple(part.to(layout.device, layout.dtype, copy=self._shared) for part in parts)
        self.release()
        return taken

    def release(self) -> None:
        """See `CurrentState.release`."""
        self.replace((), shared=False)

    def _can_borrow(self, part: torch.Tensor) -> bool:
        # A tensor of inference mode has no version, so a write by f could not be detected.
        return (
            part.dtype is self._layout.state_dtype
            and part.device == self._layout.vec_device
            and part.is_contiguous()
            and not part.is_inference()
        )

    def _own(self) -> torch.Tensor:
        """Replace the state by undefined values in new memory, and return that as a flat tensor."""
        layout = self._layout
        flat = torch.empty(layout.size, dtype=layout.state_dtype, device=layout.vec_device)
        # A caller could not write into views of one tensor.
        self.replace(layout.parts(flat), shared=len(layout.shapes) > 1)
        return flat


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
