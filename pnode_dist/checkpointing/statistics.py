"""What one solve and its adjoint cost, in counts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class SolveStatistics:
    """Counters of one solve on this rank, filled by its forward pass and then by its backward pass.

    `forward_steps` are the steps of the forward pass, `recomputed_steps` those run again for the adjoint,
    `adjoint_steps` the reversed ones. `function_evaluations` counts calls of the right-hand side (of either part of a
    `SplitFunction`), `vjps` its vector-Jacobian products, `jvps` its Jacobian-vector products. Of implicit methods,
    `newton_iterations` and `linear_iterations` are those of steps, run again or not, and `adjoint_linear_iterations`
    those of the transposed systems. `bytes_written` and `bytes_read` are the traffic with disk checkpoints;
    `checkpoint_bytes_peak` the most that checkpoints occupied at once in memory and on disk together. `graph_steps`
    are the steps whose graphs were kept from the forward pass, `graph_bytes` the memory of these.
    `rejected_steps` are the attempts that error control did not accept. `seconds_waiting_for_disk` is how long the
    solver stood still for disk checkpoints. `largest_rounding` is the largest error that a narrower
    `checkpoint_dtype` made in a checkpoint, relative to the largest entry of the state on this rank; of several solves
    it is the largest, everything else adds up. `largest_mismatch` is likewise the largest difference, relative to the
    state, between a recomputed step and the same step of the forward pass.
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
