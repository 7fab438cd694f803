"""The surroundings of f in a forward pass, which its backward pass restores to evaluate f again.

These are the values of all names that f reads (see `bindings`), autocast, and torch's default floating type. Random
states and tensors that f itself changes are handled by `carried`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pnode_dist.ode.recomputation.bindings import Bindings, bindings_of


@dataclass(frozen=True)
class Autocast:
    """The state of `torch.autocast` for some types of devices: on or off, and its floating type."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        """Return the present state for operations on the host and on `device`."""
        kinds = dict.fromkeys(("cpu", device.type))
        return cls(tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))

    @property
    def on(self) -> bool:
        """True if autocast is on for any type of device."""
        return any(enabled for _, enabled, _ in self.states)

    def put(self) -> None:
        """Set this state."""
        for kind, enabled, dtype in self.states:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Disable autocast's cache: a cached cast that was made without a gradient would hide its parameter."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@dataclass
class Surroundings:
    """The surroundings of a right-hand side and its extra arguments in the forward pass.

    `versions` has the tensors that f reads, and their versions after the forward pass.
    """

    bindings: Bindings
    autocast: Autocast
    default_dtype: torch.dtype
    versions: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    @classmethod
    def now(cls, func: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> Surroundings:
        """Capture the present surroundings."""
        return cls(bindings_of(func, *args), Autocast.now(device), torch.get_default_dtype())

    @contextmanager
    def restored(self, replaced: Mapping[int, Any] | None = None) -> Iterator[None]:
        """Restore the surroundings within the context, with some values replaced by their `id`."""
        autocast, default_dtype = Autocast(tuple(_of(kind) for kind, _, _ in self.autocast.states)), None
        if torch.get_default_dtype() is not self.default_dtype:
            default_dtype = torch.get_default_dtype()
            torch.set_default_dtype(self.default_dtype)
        changes_autocast = autocast != self.autocast
        if changes_autocast:
            self.autocast.put()
        try:
            with self.bindings.installed(replaced):
                yield
        finally:
            if changes_autocast:
                autocast.put()
            if default_dtype is not None:
                torch.set_default_dtype(default_dtype)

    def end_forward(self) -> None:
        """Store the versions of the tensors that f reads."""
        self.versions = [(tensor, tensor._version) for tensor in self.bindings.tensors if not tensor.is_inference()]

    def reasons(self) -> list[str]:
        """Describe the tensors that f reads and that were changed in place since the forward pass."""
        return [
            f"a tensor of shape {tuple(tensor.shape)} that it reads was changed in place after the forward pass"
            for tensor, version in self.versions
            if tensor._version != version
        ]


def _of(kind: str) -> tuple[str, bool, torch.dtype]:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
