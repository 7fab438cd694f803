"""The costs of halo exchanges: one wide halo against a narrow one for each layer.

An exchange of n bytes takes t0 + n / r (R. W. Hockney, The communication challenge for MPP, Parallel Computing 20
(1994)). A wide halo saves all but one t0. It sends more bytes, and every rank recomputes points of its neighbours (F.
Kjolstad, M. Snir, Ghost cell pattern, ParaPLoP 2010). A backward pass about doubles both costs, so the forward passes
are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExchangeCost:
    """The cost of an exchange in seconds: `latency`, and `seconds_per_byte` received."""

    latency: float
    seconds_per_byte: float

    def seconds(self, size: int) -> float:
        """Return the seconds of an exchange of `size` bytes, zero without any."""
        return self.latency + size * self.seconds_per_byte if size else 0.0


def fitted(small: tuple[int, float], large: tuple[int, float]) -> ExchangeCost:
    """Fit the costs to two measured exchanges, pairs of bytes and seconds. Neither cost is negative."""
    (small_size, small_time), (large_size, large_time) = small, large
    per_byte = max(0.0, (large_time - small_time) / (large_size - small_size)) if large_size > small_size else 0.0
    return ExchangeCost(max(0.0, small_time - small_size * per_byte), per_byte)


def seconds_apart(cost: ExchangeCost, sizes: Sequence[int]) -> float:
    """Return the seconds of one exchange for each layer, of `sizes` bytes."""
    return sum(cost.seconds(size) for size in sizes)


def seconds_at_once(cost: ExchangeCost, size: int, redundant: float) -> float:
    """Return the seconds of a single exchange of `size` bytes, and of `redundant` computing."""
    return cost.seconds(size) + redundant
