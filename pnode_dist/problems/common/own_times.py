"""Solving windows of unequal times together, each at its own times.

With a common clock tau that advances by `interval` from output to output, and each window's time t(tau) a smooth
increasing function through its own times, du/dtau = f(t, u) dt/dtau. All windows then share one solve with the same
outputs, and the state at an output is the state at the window's own time.
"""

from __future__ import annotations

import torch


def slopes(elapsed: torch.Tensor, interval: float) -> torch.Tensor:
    """dt/dtau at the outputs of each window, from the times `[window, output]` elapsed since its start.

    The harmonic means of the spacings at both sides: the cubic between two outputs then increases all along (Fritsch
    and Butland, SIAM J. Sci. Stat. Comput. 5, 1984).
    """
    spacing = torch.diff(elapsed, dim=-1) / interval
    before, after = spacing[:, :-1], spacing[:, 1:]
    inner = 2 * before * after / (before + after)
    return torch.cat([spacing[:, :1], inner, spacing[:, -1:]], dim=-1)


def own_time(
    tau: torch.Tensor, elapsed: torch.Tensor, slope: torch.Tensor, interval: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each window's time and its derivative with respect to the clock, both `[window]`, at the clock's time `tau`."""
    position = tau / interval
    number = position.detach().floor().clamp(0, elapsed.shape[-1] - 2).long().reshape(1)
    s = position - number
    start, end = (elapsed.index_select(-1, number + shift).squeeze(-1) for shift in (0, 1))
    first, last = (slope.index_select(-1, number + shift).squeeze(-1) * interval for shift in (0, 1))
    span = end - start
    # The cubic Hermite polynomial on one interval.
    square = first + last - 2 * span
    linear = 3 * span - 2 * first - last
    time = start + s * (first + s * (linear + s * square))
    rate = (first + s * (2 * linear + 3 * s * square)) / interval
    return time, rate
