"""The ranks as state x data: meshes, torch.distributed over MPI, gradient sums, split parameters, batches."""
