"""The gradient through thousands of steps of quasi-geostrophic turbulence, within a budget of memory and disk.

mpirun -n 2 python turbulence.py 512 5000 128MiB 2GiB float32    # a grid of 512 x 512, 5,000 steps
mpirun -n 2 python turbulence.py 32 60 256KiB 256KiB             # seconds
mpirun -n 1 python turbulence.py 32 60 naive                     # the same by torch alone, through all steps
"""

import resource
import sys
import time

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.problems.qg.physics import QGTendency, SmallScaleFilter, initial_state

HOUR, UNIT, NOISE = 3600.0, 1e-5, 3e-5
SIZE_OF_STEP = 128  # hours, divided by the points of a side


class Damping(nn.Module):
    """A closure that damps the potential vorticity of each layer, at rates in 1/day."""

    def __init__(self, dtype):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([0.01, 0.02], dtype=dtype))

    def forward(self, q, u, v):
        return -self.rates / (24 * HOUR) * q


class Turbulence(nn.Module):
    """The rate of the potential vorticity in `UNIT` per hour."""

    def __init__(self, partition, dtype):
        super().__init__()
        self.equations = QGTendency(partition, closure=Damping(dtype), dtype=dtype)

    def forward(self, t, w):
        return self.equations(t, w * UNIT) * (HOUR / UNIT)


def end_by_torch(func, small_scales, state, hours, steps):
    """The last state, by classical Runge-Kutta steps in plain torch."""
    for _ in range(steps):
        first = func(0.0, state)
        second = func(0.0, state + hours / 2 * first)
        third = func(0.0, state + hours / 2 * second)
        fourth = func(0.0, state + hours * third)
        state = small_scales(0.0, state + hours / 6 * (first + 2 * second + 2 * third + fourth))
    return state


def main(points, steps, budget, dtype):
    with Mesh() as mesh:
        partition = GridPartition(mesh, (points, points), 2, "periodic", processes=(mesh.state_ranks, 1))
        func, small_scales = Turbulence(partition, dtype), SmallScaleFilter(partition, dtype=dtype)
        initial = (initial_state(partition, NOISE, seed=0) / UNIT).to(dtype).requires_grad_()
        hours = SIZE_OF_STEP / points
        before, began = peak(), time.monotonic()
        if budget is None:
            node, end = None, end_by_torch(func, small_scales, initial, hours, steps)
        else:
            node = NeuralODE(
                func,
                method="rk4",
                step_size=hours,
                partition=partition,
                trajectory=Trajectory(*budget),
                between_steps=small_scales,
                last_only=True,
            )
            end = node(initial, [0.0, steps * hours])
        forward = time.monotonic() - began
        loss = end.square().sum() / points**2
        loss.backward()
        backward = time.monotonic() - began - forward
        figures = [mesh.sum(loss.detach()), mesh.sum(initial.grad.square().sum())]
        figures += mesh.sum(func.equations.closure.rates.grad).tolist()
        most = MPI.COMM_WORLD.allreduce(peak() - before, MPI.MAX)
        if mesh.is_root:
            print("loss, |dloss/du0|^2, dloss/drates:", *(f"{float(figure):.12e}" for figure in figures))
            print(f"forward pass {forward:.0f} s, backward pass {backward:.0f} s")
            if node is not None:
                solve = node.last_solve
                print(
                    f"steps {solve.forward_steps}, recomputed {solve.recomputed_steps}, adjoint {solve.adjoint_steps}"
                )
                print(f"written to disk {solve.bytes_written / 2**20:.0f} MiB, read {solve.bytes_read / 2**20:.0f} MiB")
            print(f"peak memory of a rank above that before the solve: {most:.0f} MiB")


def peak():
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    single = "float32" in sys.argv
    given = [word for word in sys.argv[3:] if word not in ("float32", "naive")]
    main(
        int(sys.argv[1]),
        int(sys.argv[2]),
        None if "naive" in sys.argv else given,
        torch.float32 if single else torch.float64,
    )
