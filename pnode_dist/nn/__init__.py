"""Layers for partitioned states: torch.nn's names, arguments and weights, with the halo exchange inside."""

from pnode_dist.nn.conv import Conv2d as Conv2d

__all__ = ["Conv2d"]
