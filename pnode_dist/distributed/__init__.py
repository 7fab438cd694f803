"""Meshes of state ranks x data replicas, torch.distributed over MPI, gradient sums, sharded parameters, batches."""
