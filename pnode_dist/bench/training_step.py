"""Training step measured by benchmarks: a loss and its gradient through RK4 steps of a convolutional network.

The network is that of the Gray-Scott problem: three convolutions with 16 channels, on a periodic grid.
"""

from __future__ import annotations

import time

import torch
from mpi4py import MPI

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.exchange import halo
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.gray_scott.model import right_hand_side
from pnode_dist.problems.gray_scott.physics import initial_state

SPECIES, CHANNELS, LAYERS = 2, 16, 3
STEPS, STEP_SIZE = 2, 1.0
STAGES = 4
_EXCHANGES = 20


class TrainingStep:
    """Loss and gradient on the ranks of `comm`, which share one state on a grid of `shape`. Collective on `comm`.

    State and parameters have `dtype`. f computes in `compute_dtype`, by default the same. `gradient` is the gradient of
    the last `seconds()`, summed over the ranks.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        shape: tuple[int, int],
        steps: int = STEPS,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.comm = comm
        self.steps = steps
        self.partition = GridPartition(comm, shape, SPECIES, ("periodic", "periodic"))
        self.func = right_hand_side(self.partition, CHANNELS, LAYERS, dtype)
        self.state = initial_state(self.partition, 0).to(dtype)
        self.node = NeuralODE(
            self.func,
            method="rk4",
            step_size=STEP_SIZE,
            partition=self.partition,
            trajectory=CheckpointBudget(ram="8GiB", keep="graph"),
            compute_dtype=compute_dtype,
        )
        self.gradient = torch.empty(0)

    def solve(self) -> torch.Tensor:
        """Return this rank's part of the final state."""
        end: torch.Tensor = self.node(self.state, [0.0, self.steps * STEP_SIZE])[-1]
        return end

    def seconds(self) -> float:
        """Run the step and return the seconds of this rank. Collective on `comm`."""
        self.comm.Barrier()
        began = time.perf_counter()
        share = self.solve().square().sum()
        gradients = torch.autograd.grad(share, list(self.func.parameters()))
        self.gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if self.comm.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, self.gradient.numpy())
        return time.perf_counter() - began

    def halo_seconds(self) -> float:
        """Return the seconds of all halo exchanges of a step, each measured alone. Collective on `comm`.

        Each exchange is timed together with its transpose.
        """
        total = 0.0
        for channels in exchanged_channels():
            x = torch.zeros(*self.partition.local_shape[:2], channels, requires_grad=True)
            cotangent = torch.ones_like(halo(x, self.partition))
            found = []
            for _ in range(_EXCHANGES):
                self.comm.Barrier()
                began = time.perf_counter()
                torch.autograd.grad(halo(x, self.partition), x, cotangent)
                found.append(time.perf_counter() - began)
            total += min(found)
        return self.steps * STAGES * total

    def sum_seconds(self) -> float:
        """Return the seconds of the gradient sum alone. Collective on `comm`."""
        values = self.gradient.clone().numpy()
        found = []
        for _ in range(_EXCHANGES):
            self.comm.Barrier()
            began = time.perf_counter()
            self.comm.Allreduce(MPI.IN_PLACE, values)
            found.append(time.perf_counter() - began)
        return min(found)


def exchanged_channels() -> list[int]:
    """Return the channels of each halo exchange in one evaluation of f: the input channels of its convolutions."""
    return [SPECIES, *[CHANNELS] * (LAYERS - 1)]
