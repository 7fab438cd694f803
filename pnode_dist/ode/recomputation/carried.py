"""State that f carries from one evaluation to the next: random generators, tensors and attributes that it changes.

A recomputed step needs this state as it was in the forward pass. `Carried.mark` saves it at a checkpoint, and
`Carried.restore` restores it. Marks of the same state share their copies. If the first step changes nothing, no further
marks are taken: the cost for an f without such state is one comparison for each solve.

torch.utils.checkpoint restores random states in the same way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pnode_dist.ode.recomputation.bindings import Bindings, Changes

_SMALL = 2**16
"""Tensors of at most so many bytes are copied, and the copies kept, as long as a solve may be recomputed."""


@dataclass(frozen=True)
class Mark:
    """The carried state at one moment: random states, copies of tensors with their versions, and bindings."""

    random: tuple[torch.Tensor, ...]
    tensors: tuple[tuple[int, torch.Tensor], ...]
    names: Changes


class KnownTensors:
    """Facts about the tensors that a right-hand side reads, from its earlier solves.

    `carries`: f carried state in an earlier solve, but not in its first step.
    """

    def __init__(self) -> None:
        self._unchanged: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self.carries = False

    def copy_of(self, tensor: torch.Tensor, is_buffer: bool) -> torch.Tensor | None:
        """Copy `tensor`. Returns None for a large one that is not a buffer, or that an earlier solve did not change."""
        if not _is_small(tensor):
            held = self._unchanged.get(id(tensor))
            if not is_buffer or (held is not None and held[0]() is tensor and held[1] == tensor._version):
                return None
        return tensor.detach().clone()

    def unchanged(self, tensor: torch.Tensor) -> None:
        """Note that a solve did not change `tensor`."""
        if not _is_small(tensor):
            self._unchanged = {key: held for key, held in self._unchanged.items() if held[0]() is not None}
            self._unchanged[id(tensor)] = (weakref.ref(tensor), tensor._version)


def _is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() <= _SMALL


class Carried:
    """The carried state of one right-hand side through one solve.

    `bindings` are the names that f reads. `tensors` are those that it may change, each with True for a buffer. With
    `random` the states of torch's generators, of the host and of `device`, are carried too. `draws`: f has drawn random
    numbers.
    """

    def __init__(
        self,
        bindings: Bindings,
        tensors: Iterable[tuple[torch.Tensor, bool]] = (),
        device: torch.device | None = None,
        random: bool = True,
        known: KnownTensors | None = None,
    ) -> None:
        self._bindings, self._known = bindings, known or KnownTensors()
        self._generators = generators(device) if random else []
        copies = [
            (tensor, copy)
            for tensor, is_buffer in tensors
            if not (tensor.requires_grad or tensor.is_inference())
            and (copy := self._known.copy_of(tensor, is_buffer)) is not None
        ]
        self._tensors = [tensor for tensor, _ in copies]
        self.initial = Mark(
            tuple(get() for get, _ in self._generators), tuple((tensor._version, copy) for tensor, copy in copies), {}
        )
        self._last = self.initial
        # True if f carries state; None until the first step is taken.
        self._active: bool | None = True if self._known.carries else None
        self.draws = False

    @property
    def active(self) -> bool:
        """False if f is known to carry no state."""
        return self._active is not False

    def mark(self, step: int | None = None) -> Mark | None:
        """Return a mark of the present state, before `step` if given. None if f is known to carry no state."""
        if step == 0:
            return self.initial
        if self._active is False:
            return None
        self._last = self._take()
        return self._last

    def settle(self) -> None:
        """Decide after the first step if marks are needed: only if it has changed anything."""
        if self._active is None:
            self._active = self.has_changed()

    def end_forward(self) -> None:
        """Note the changes of a forward pass at its end."""
        late = not self._active and self.has_changed()
        self.draws = self._drawn(self.initial)
        self._known.carries = self._known.carries or late
        for tensor, (version, copy) in zip(self._tensors, self.initial.tensors, strict=True):
            if _is_as(tensor, version, copy):
                self._known.unchanged(tensor)

    def restore(self, mark: Mark | None) -> None:
        """Restore the state of `mark`. Does nothing for None, or if f is known to carry no state."""
        if mark is None or self._active is False:
            return
        self._put(mark)

    def restart(self) -> None:
        """Restore the state at the beginning of the solve."""
        if self._active is not False:
            self.restore(self.initial)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Undo all changes of the carried state at the end of the context."""
        before = self.mark()
        try:
            yield
        finally:
            self.restore(before)

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Restore the initial state for a backward pass, and the present state after it."""
        if self._active is False and self._tensors_are_as_in(self.initial):
            yield
            return
        before = self._take()
        if self._active is False:
            self._restore_tensors(self.initial)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, mark: Mark) -> None:
        for state, (get, put) in zip(mark.random, self._generators, strict=True):
            if not _equal(get(), state):
                put(state)
        self._restore_tensors(mark)
        self._bindings.change_to(mark.names)

    def _restore_tensors(self, mark: Mark) -> None:
        with torch.no_grad():
            for tensor, (version, copy) in zip(self._tensors, mark.tensors, strict=True):
                if not _is_as(tensor, version, copy):
                    # Batch normalisation does not count its writes. To count this one would invalidate graphs.
                    (tensor.data if tensor._version == version else tensor).copy_(copy)

    def _tensors_are_as_in(self, mark: Mark) -> bool:
        return all(_is_as(tensor, *held) for tensor, held in zip(self._tensors, mark.tensors, strict=True))

    def has_changed(self) -> bool:
        """Return True if the present state differs from that at the beginning of the solve."""
        initial = self.initial
        return not self._tensors_are_as_in(initial) or self._drawn(initial) or bool(self._bindings.changes())

    def _drawn(self, since: Mark) -> bool:
        return any(not _equal(get(), state) for state, (get, _) in zip(since.random, self._generators, strict=True))

    def _take(self) -> Mark:
        last = self._last
        random = tuple(get() for get, _ in self._generators)
        if all(map(_equal, random, last.random)):
            random = last.random
        tensors = tuple(
            (version, copy) if _is_as(tensor, version, copy) else (tensor._version, tensor.detach().clone())
            for tensor, (version, copy) in zip(self._tensors, last.tensors, strict=True)
        )
        return Mark(random, tensors, self._bindings.changes())


def _is_as(tensor: torch.Tensor, version: int, copy: torch.Tensor) -> bool:
    """Return True if a tensor has not changed since a copy was made of it.

    Small tensors are compared by their values, because batch normalisation writes its running statistics without a
    change of their versions.
    """
    if tensor._version != version or _is_small(tensor):
        return torch.equal(tensor, copy)
    return True


NOTHING_CARRIED = Carried(Bindings((), (), (), frozenset()), random=False)
NOTHING_CARRIED.settle()


def generators(device: torch.device | None) -> list[tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], Any]]]:
    """Return the functions that get and set the states of torch's generators."""
    found: list[tuple[Any, Any]] = [(torch.get_rng_state, torch.set_rng_state)]
    if device is not None and device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        if not hasattr(module, "get_rng_state"):
            return found
        found.append((lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)))
    return found


def _equal(state: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if two random states are equal. Compares eight bytes at a time where possible."""
    if state.numel() % 8 == 0 and state.is_contiguous() and other.is_contiguous():
        return torch.equal(state.view(torch.int64), other.view(torch.int64))
    return torch.equal(state, other)
