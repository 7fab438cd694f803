"""Counters of one solve and its adjoint."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class SolveStatistics:
    """Counters of one solve on this rank. The forward pass fills them first, then the backward pass.

    - `forward_steps`, `recomputed_steps`, `adjoint_steps`: steps of the forward pass, steps recomputed for the adjoint,
      and reversed steps.
    - `function_evaluations`, `vjps`, `jvps`: evaluations of the right-hand side (of either part of a `SplitFunction`),
      its vector-Jacobian products and its Jacobian-vector products.
    - `newton_iterations`, `linear_iterations`, `adjoint_linear_iterations`: iterations of implicit methods, in steps
      (recomputed ones included), and in the transposed systems of adjoint steps.
    - `bytes_written`, `bytes_read`: the traffic with disk checkpoints.
    - `checkpoint_bytes_peak`: the most memory and disk that checkpoints occupied at once.
    - `rejected_steps`: attempts that error control did not accept.
    - `graph_steps`, `graph_bytes`: steps whose tapes were kept from the forward pass, and their memory.
    - `seconds_waiting_for_disk`: the time that the solver waited for disk checkpoints.
    - `largest_rounding`: the largest error of a checkpoint in a narrower `checkpoint_dtype`, relative to the largest
      entry of the state on this rank.
    - `largest_mismatch`: the largest difference between a recomputed step and the same step of the forward pass,
      relative to the state.

    The sum of several solves adds the counters, and takes the maximum of the last two.
    """

    forward_steps: int = 0
    recomputed_steps: int = 0
    adjoint_steps: int = 0
    function_evaluations: int = 0
    vjps: int = 0
    jvps: int = 0
    newton_iterations: int = 0
    linear_iterations: int = 0
    adjoint_linear_iterations: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    checkpoint_bytes_peak: int = 0
    rejected_steps: int = 0
    graph_steps: int = 0
    graph_bytes: int = 0
    seconds_waiting_for_disk: float = 0.0
    largest_rounding: float = 0.0
    largest_mismatch: float = 0.0

    def __add__(self, other: SolveStatistics) -> SolveStatistics:
        total = SolveStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))
        total.largest_rounding = max(self.largest_rounding, other.largest_rounding)
        total.largest_mismatch = max(self.largest_mismatch, other.largest_mismatch)
        return total
