"""A solve as an operation of torch.autograd and torch.func."""
