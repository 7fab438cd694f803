"""A training loop of one's own: the library's solve under DistributedDataParallel, without its command line.

Each rank owns a part of the state; the ranks of a replica share one loss, and replicas see different samples:

    mpirun -n 4 python train.py 2      # 2 replicas, each of 2 ranks
"""

import sys

import torch
from torch import nn

from pnode_dist import DensePartition, Mesh, NeuralODE, Trajectory
from pnode_dist.distributed.gradients import clip_gradient_norm, parallel, share_of_mean
from pnode_dist.distributed.sampler import ReplicaSampler
from pnode_dist.nn import Linear

SIZE, SAMPLES, BATCH, TIMES = 16, 24, 8, [0.0, 0.5, 1.0]


class Coupled(nn.Module):
    """du/dt = W tanh(u) - u: every entry depends on all others, also on those of other ranks."""

    def __init__(self, partition):
        super().__init__()
        self.weight = Linear(partition, partition)

    def forward(self, t, u):
        return self.weight(torch.tanh(u)) - u


def main(replicas):
    with Mesh(data=replicas) as mesh:
        partition = DensePartition(mesh, SIZE)
        torch.manual_seed(0)
        func = Coupled(partition)
        # At most 64 KiB of checkpoints on each rank; what does not fit is recomputed.
        node = NeuralODE(func, method="dopri5", step_size=0.1, partition=partition, trajectory=Trajectory(ram="64KiB"))
        model = parallel(node, mesh)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.02)

        whole = torch.randn(SAMPLES, SIZE, generator=torch.Generator().manual_seed(1))
        start = partition.scatter(whole).float()  # this rank's entries of every sample
        goal = 0.5 * start
        sampler = ReplicaSampler(SAMPLES, BATCH, mesh, seed=0)
        for epoch in range(1, 6):
            sampler.set_epoch(epoch)
            total = 0.0
            for numbers in sampler:
                optimiser.zero_grad()
                end = model(start[numbers], TIMES)[-1]
                squares = (end - goal[numbers]).square().sum()
                loss = share_of_mean(squares, len(numbers) * SIZE, mesh)  # this rank's share
                loss.backward()  # summed over state ranks, averaged over replicas
                clip_gradient_norm(model, 1.0, mesh)
                optimiser.step()
                total += mesh.sum(loss.detach()).item() / mesh.data_replicas
            if mesh.is_root:
                print(f"epoch {epoch}  loss {total / len(sampler):.6f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
