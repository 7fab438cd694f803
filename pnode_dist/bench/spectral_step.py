"""Training step with Fourier transforms: a loss and its gradient through RK4 steps of two-layer quasi-geostrophic flow.

dq_i/dt = -J(psi_i, q_i) - U_i dq_i/dx - Q_i dpsi_i/dx - nu del^8 q_i, with q_i = del^2 psi_i + F (psi_j - psi_i), and
drag on the lower layer, on a doubly periodic square of sides 2 pi (G. K. Vallis: Atmospheric and Oceanic Fluid
Dynamics, 2nd ed. (2017), section 5.4). Learnt are the drag, the viscosity, and the shear of the mean flow.
"""

from __future__ import annotations

import time

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.exchange import irfft2, redistribute, rfft2
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.spectral import SpectralPartition

STEPS, STEP_SIZE, STAGES = 2, 1e-3, 4
LAYERS = 2
COUPLING, BETA = 100.0, 10.0
TRANSFORMED = (LAYERS, 2 * LAYERS, 2 * LAYERS, LAYERS)
"""The fields of each transform in one evaluation: q, then both velocities, both fluxes, and dq/dt."""
_EXCHANGES = 5


class TwoLayers(nn.Module):
    """dq/dt of the potential vorticity `[..., y, x, layer]` of two layers of equal depth. Collective."""

    def __init__(self, spectrum: SpectralPartition, dtype: torch.dtype) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.ky, self.kx = spectrum.wavenumbers(dtype=dtype)
        self.square = self.kx**2 + self.ky**2
        self.mask = spectrum.dealias(dtype=dtype)
        self.viscosity = nn.Parameter(torch.tensor(1e-12, dtype=dtype))
        self.drag = nn.Parameter(torch.tensor(0.1, dtype=dtype))
        self.shear = nn.Parameter(torch.tensor(1.0, dtype=dtype))

    def forward(self, t: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Return dq/dt."""
        spectrum, square = self.spectrum, self.square
        modes = self.mask * rfft2(q, spectrum)
        psi = self.stream(modes)
        along, across = -1j * self.ky * psi, 1j * self.kx * psi
        u, v = torch.split(irfft2(torch.cat([along, across], dim=-1), spectrum), LAYERS, dim=-1)
        fluxes = torch.split(rfft2(torch.cat([u * q, v * q], dim=-1), spectrum), LAYERS, dim=-1)
        mean = self.shear * modes.real.new_tensor([0.5, -0.5])
        gradient = BETA + 2 * COUPLING * mean
        rates = -self.mask * (1j * self.kx * fluxes[0] + 1j * self.ky * fluxes[1])
        rates = rates - 1j * self.kx * (mean * modes + gradient * psi) - self.viscosity * square**4 * modes
        below = modes.real.new_tensor([0.0, 1.0])
        return irfft2(rates + self.drag * below * square * psi, spectrum)

    def stream(self, modes: torch.Tensor) -> torch.Tensor:
        """Return the stream function of potential vorticities: a system of two equations for each wave number."""
        upper, lower = torch.split(modes, 1, dim=-1)
        diagonal = self.square + COUPLING
        determinant = COUPLING**2 - diagonal**2
        safe = determinant.where(self.square > 0, -1.0)
        pair = torch.cat([diagonal * upper + COUPLING * lower, COUPLING * upper + diagonal * lower], dim=-1)
        return (pair / safe).where(self.square > 0, 0.0)


class SpectralStep:
    """Loss and gradient on the ranks of `comm`, which share one state on a grid of `shape`. Collective on `comm`.

    `gradient` is the gradient of the last `seconds()`, summed over the ranks.
    """

    def __init__(self, comm: MPI.Comm, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> None:
        self.comm = comm
        self.partition = GridPartition(comm, shape, LAYERS, "periodic", processes=(comm.size, 1))
        self.spectrum = SpectralPartition(self.partition)
        self.func = TwoLayers(self.spectrum, dtype)
        self.state = vortices(self.partition).to(dtype)
        self.node = NeuralODE(
            self.func,
            method="rk4",
            step_size=STEP_SIZE,
            partition=self.partition,
            trajectory=CheckpointBudget(ram="8GiB", keep="graph"),
        )
        self.gradient = torch.empty(0)

    def seconds(self) -> float:
        """Run the step and return the seconds of this rank. Collective on `comm`."""
        self.comm.Barrier()
        began = time.perf_counter()
        share = self.node(self.state, [0.0, STEPS * STEP_SIZE])[-1].square().sum()
        gradients = torch.autograd.grad(share, list(self.func.parameters()))
        self.gradient = torch.stack(gradients)
        if self.comm.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, self.gradient.numpy())
        return time.perf_counter() - began

    def transpose_seconds(self) -> float:
        """Return the seconds of all transposes of a step and of their adjoints, each measured alone. Collective."""
        spectrum, total = self.spectrum, 0.0
        complex_type = self.state.dtype.to_complex()
        rows = spectrum.stages[0].after
        for fields in TRANSFORMED:
            lines = torch.zeros(*rows.local_shape[:-1], fields, dtype=complex_type)
            found = []
            for _ in range(_EXCHANGES):
                self.comm.Barrier()
                began = time.perf_counter()
                redistribute(redistribute(lines, rows, spectrum.blocks), spectrum.blocks, rows)
                found.append(time.perf_counter() - began)
            total += min(found)
        return STEPS * STAGES * total


def vortices(partition: GridPartition) -> torch.Tensor:
    """Return potential vorticities of a few waves, the same field on any number of ranks."""
    y, x = (
        torch.arange(start, stop, dtype=torch.float64) * (2 * torch.pi / n)
        for n, (start, stop) in zip(partition.shape, partition.owned, strict=True)
    )
    y = y[:, None]
    upper = torch.sin(3 * x + y) + 0.5 * torch.cos(2 * y - x)
    lower = torch.cos(x + 2 * y) + 0.5 * torch.sin(4 * x - y)
    return torch.stack([upper, lower], dim=-1)
