"""The gradient of a loss of point values at many output times, without the states at these times.

mpirun -n 2 python points.py 512 2000            # a grid of 512 x 512, 2,000 output times
mpirun -n 2 python points.py 64 200 states       # the same loss from all states
"""

import resource
import sys

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.exchange import halo

SENSORS, STEP = 100, 0.1


class Reaction(nn.Module):
    """du/dt = D laplacian(u) - u^3, with a coefficient D for each of two channels, on a periodic grid."""

    def __init__(self, partition):
        super().__init__()
        self.partition = partition
        self.coefficients = nn.Parameter(torch.tensor([0.2, 0.1], dtype=torch.float64))

    def forward(self, t, u):
        wide = halo(u, self.partition, 1)
        neighbours = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
        return self.coefficients * (neighbours - 4 * u) - u**3


class Sensors:
    """The values at points of the grid that this rank owns."""

    def __init__(self, points, partition):
        (top, bottom), (left, right) = partition.owned
        rows, columns = points.T
        owned = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        self.rows, self.columns = rows[owned] - top, columns[owned] - left

    def __call__(self, t, u):
        return u[self.rows, self.columns]


def main(side, times, keeps_states):
    with Mesh() as mesh:
        partition = GridPartition(mesh, (side, side), channels=2, boundary="periodic")
        generator = torch.Generator().manual_seed(1)
        sensors = Sensors(torch.randint(0, side, (SENSORS, 2), generator=generator), partition)
        whole = 0.4 * torch.randn(side, side, 2, generator=generator, dtype=torch.float64)
        u0 = partition.scatter(whole).requires_grad_()
        func = Reaction(partition)
        node = NeuralODE(func, method="rk4", partition=partition, trajectory=Trajectory(ram="256MiB"))
        t = STEP * torch.arange(times, dtype=torch.float64)
        before = peak()
        if keeps_states:
            states = node(u0, t)
            values = torch.stack([sensors(time, u) for time, u in zip(t, states, strict=True)])
        else:
            node.observe = sensors
            values = node(u0, t)
        loss = values.square().sum()
        loss.backward()
        figures = [mesh.sum(loss.detach()), mesh.sum(u0.grad.square().sum())]
        figures += mesh.sum(func.coefficients.grad).tolist()
        most = MPI.COMM_WORLD.allreduce(peak() - before, MPI.MAX)
        if mesh.rank == 0:
            print("loss, |dloss/du0|^2, dloss/dD:", *(f"{float(figure):.12e}" for figure in figures))
            print(f"peak memory of a rank above that before the solve: {most:.0f} MiB")


def peak():
    """The largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "states" in sys.argv[3:])
