"""A right-hand side that records the steps that a solver takes with it."""

from __future__ import annotations

import torch

from tests.oracles.right_hand_sides import Network

Steps = list[tuple[float, float]]


class Recorded(Network):
    """`Network` with torchdiffeq's callbacks: the times and sizes of steps, and the states before them."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: Steps = []
        self.accepted: Steps = []
        self.rejected: Steps = []
        self.states: list[torch.Tensor] = []

    def callback_step(self, t: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> None:
        self.taken.append((t.item(), h.item()))
        self.states.append(y.detach().clone())

    def callback_accept_step(self, t: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> None:
        self.accepted.append((t.item(), h.item()))

    def callback_reject_step(self, t: torch.Tensor, y: torch.Tensor, h: torch.Tensor) -> None:
        self.rejected.append((t.item(), h.item()))
