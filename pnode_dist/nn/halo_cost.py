"""What halo exchanges cost: whether one wide halo is cheaper than a narrow one for each layer.

An exchange of n bytes takes t0 + n / r (R. W. Hockney, The communication challenge for MPP, Parallel Computing 20
(1994)). A wide halo saves all but one t0, sends more at once, and has every rank compute again what its neighbours
compute too (F. Kjolstad, M. Snir, Ghost cell pattern, ParaPLoP 2010). A backward pass exchanges and computes the same
once more and about doubles both sides, so that forward passes are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExchangeCost:
    """Seconds of an exchange: `latency`, and `seconds_per_byte` for what a rank receives."""

    latency: float
    seconds_per_byte: float

    def seconds(self, size: int) -> float:
        """Of an exchange of `size` bytes, nothing if there are none."""
        return self.latency + size * self.seconds_per_byte if size else 0.0


def fitted(small: tuple[int, float], large: tuple[int, float]) -> ExchangeCost:
    """The costs that agree with two measured exchanges, pairs of bytes and seconds; neither of them negative."""
    (small_size, small_time), (large_size, large_time) = small, large
    per_byte = max(0.0, (large_time - small_time) / (large_size - small_size)) if large_size > small_size else 0.0
    return ExchangeCost(max(0.0, small_time - small_size * per_byte), per_byte)


def seconds_apart(cost: ExchangeCost, sizes: Sequence[int]) -> float:
    """Of an exchange for each layer, of `sizes` bytes."""
    return sum(cost.seconds(size) for size in sizes)


def seconds_at_once(cost: ExchangeCost, size: int, redundant: float) -> float:
    """Of a single exchange of `size` bytes, and `redundant` seconds more of computing."""
    return cost.seconds(size) + redundant
