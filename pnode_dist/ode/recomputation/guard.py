"""The comparison of recomputed steps with those of the forward pass.

A recomputed step has the same adjoint only if f is the same function both times. The forward pass stores one number, a
fingerprint, for each state and each recomputed stage. Recomputed values are compared with them. Differences of the size
of rounding are accepted, because some kernels are not deterministic.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Callable, Iterable

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.errors import ConfigurationError, RecomputationError
from pnode_dist.ode.recomputation.fingerprint import fingerprint, magnitude

POLICIES = ("raise", "warn", "ignore")
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4}
_OF_NARROW_TYPES = 1e-2
_OF_NARROW_CHECKPOINTS = 1e-3
_ROUNDING = 1e-14


def check_policy(policy: str) -> None:
    """Raise `ConfigurationError` for an unknown policy."""
    if policy not in POLICIES:
        raise ConfigurationError(f"on_mismatch = {policy!r}: must be one of {', '.join(POLICIES)}")


def tolerance_of(compute_dtype: torch.dtype, state_dtype: torch.dtype, checkpoint_dtype: torch.dtype) -> float:
    """Return the largest relative difference that counts as rounding, for the types of f, state and checkpoints."""
    tolerance = max(_TOLERANCES.get(dtype, _OF_NARROW_TYPES) for dtype in (compute_dtype, state_dtype))
    narrow_checkpoints = checkpoint_dtype.itemsize < state_dtype.itemsize
    return max(tolerance, _OF_NARROW_CHECKPOINTS) if narrow_checkpoints else tolerance


class Guard:
    """The fingerprints of one solve on this rank, and the largest difference found.

    `worst` is that difference, relative to the state. `where` names the place of the first difference above the
    tolerance. `reasons` returns the known reasons for a difference, for the error message.
    """

    def __init__(self, policy: str, tolerance: float, comm: MPI.Comm, reasons: Callable[[], list[str]]) -> None:
        self._policy, self._tolerance, self._comm, self._reasons = policy, tolerance, comm, reasons
        self._states = array("d")
        self.worst, self.where = 0.0, ""

    def restart(self) -> None:
        """Delete all fingerprints at the beginning of a forward pass."""
        del self._states[:]
        self.worst, self.where = 0.0, ""

    def keep(self, unit: int, value: float) -> None:
        """Store the fingerprint of the state after a segment. Segments come in order; repeated ones are ignored."""
        if unit == len(self._states):
            self._states.append(value)

    def compare_state(self, unit: int, step: int, time: float, value: float, parts: Iterable[torch.Tensor]) -> None:
        """Compare the fingerprint of the state after a recomputed segment, whose first step is `step`.

        `parts` are of about the size of the state.
        """
        if unit < len(self._states):
            self._compare(self._states[unit], value, parts, f"step {step} from t = {time:.6g}")

    def compare_value(
        self, expected: float | None, time: float, values: tuple[torch.Tensor, ...], name: str = "func"
    ) -> None:
        """Compare a recomputed value of f at `time` with the fingerprint of the first one; None was not stored.

        `name` is that of the function in the error message.
        """
        if expected is not None:
            self._compare(expected, fingerprint(values), values, f"{name} at t = {time:.6g}")

    def _compare(self, expected: float, found: float, parts: Iterable[torch.Tensor], where: str) -> None:
        # Infinite values have no difference.
        difference = 0.0 if found == expected else abs(found - expected)
        if difference <= _ROUNDING * abs(expected) or (math.isnan(found) and math.isnan(expected)):
            return
        size = magnitude(parts)
        relative = difference / size if size > 0 and math.isfinite(difference) else math.inf
        if relative > self.worst:
            self.worst = relative
        if relative > self._tolerance and not self.where:
            self.where = where
            if self._comm.size == 1 and self._policy == "raise":
                raise RecomputationError(_message(where, relative, 0, 1, self._reasons()))

    def compare_outcome(self, expected: float, found: float, parts: Iterable[torch.Tensor]) -> None:
        """Compare the fingerprints of the result of a solve. `parts` are of about its size."""
        self._compare(expected, found, parts, "the solve")

    def finish(self) -> None:
        """Report a difference found on any rank, by the policy. Collective on the communicator.

        Raises `RecomputationError` on all ranks alike.
        """
        # Not the size of the difference: it may be NaN, whose maximum depends on the rank.
        differs = np.array([1.0 if self.where else 0.0])
        if self._comm.size > 1:
            self._comm.Allreduce(MPI.IN_PLACE, differs, MPI.MAX)
        if differs[0] == 0.0:
            return
        found = self._comm.allgather((self.where, self.worst, self._reasons()))
        rank = next(rank for rank, (where, _, _) in enumerate(found) if where)
        where, relative, reasons = found[rank]
        text = _message(where, relative, rank, self._comm.size, reasons)
        if self._policy == "raise":
            raise RecomputationError(text)
        if self._comm.rank == 0:
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def _message(where: str, relative: float, rank: int, ranks: int, reasons: list[str]) -> str:
    on_rank = f" on rank {rank}" if ranks > 1 else ""
    seen = "; ".join(reasons)
    return (
        f"{where}, recomputed for the gradient, differs from the forward pass by {relative:.2g} of its size{on_rank}: "
        f"{'observe' if where.startswith('observe') else 'func'} must be a function of t, u and its parameters alone; "
        + (f"{seen}; " if seen else "")
        + "likely reasons: an array or class attribute that it reads has changed, it draws random numbers that are "
        "not torch's, or it counts its calls (keep = 'graph' recomputes nothing; on_mismatch = 'warn' goes on)"
    )
