"""A reaction-diffusion field on a periodic plane, whose reaction is learnt and whose diffusion is known."""

import torch
from torch import nn

from pnode_dist import ForecastProblem, ForecastTable, GridPartition, TrajectoryData, odeint
from pnode_dist.exchange import halo

DIFFUSION, INTERVAL = 0.2, 0.5


def laplacian(u, partition):
    """The five-point Laplacian of `u` `[..., y, x, channel]`, with neighbours from other ranks."""
    v = halo(u, partition)
    sides = v[..., 2:, 1:-1, :] + v[..., :-2, 1:-1, :] + v[..., 1:-1, 2:, :] + v[..., 1:-1, :-2, :]
    return sides - 4 * u


class LearntReaction(nn.Module):
    def __init__(self, partition):
        super().__init__()
        self.partition = partition
        self.reaction = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, t, u):
        return DIFFUSION * laplacian(u, self.partition) + self.reaction(u)


class ReactionDiffusion(ForecastProblem):
    """Learn the reaction of a bistable field from its trajectories."""

    class ProblemConfig(ForecastTable):
        points: int = 24
        """Points along each side of the plane."""
        trajectories: int = 6
        """Trajectories in all, with those held out."""

    def build_partition(self):
        return GridPartition(self.mesh, (self.settings.points,) * 2, 1, "periodic")

    def load_data(self):
        times = [INTERVAL * number for number in range(9)]
        for seed in range(self.settings.trajectories):
            noise = torch.randn(*self.partition.global_shape, generator=torch.Generator().manual_seed(seed))
            start = self.partition.scatter(noise).double()
            u = odeint(lambda t, u: DIFFUSION * laplacian(u, self.partition) + u - u**3, start, times,
                       method="rk4", step_size=0.05, partition=self.partition)  # fmt: skip
            yield TrajectoryData(u.numpy(), times, local=True)

    def build_right_hand_side(self):
        return LearntReaction(self.partition)
