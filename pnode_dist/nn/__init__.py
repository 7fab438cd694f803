"""Layers for partitioned states: torch.nn's names, arguments and weights, with the communication inside."""

from pnode_dist.nn.conv import Conv2d as Conv2d
from pnode_dist.nn.convert import convert as convert
from pnode_dist.nn.linear import Linear as Linear
from pnode_dist.nn.message_passing import GraphConv as GraphConv
from pnode_dist.nn.message_passing import MessagePassing as MessagePassing
from pnode_dist.nn.norm import BatchNorm2d as BatchNorm2d
from pnode_dist.nn.norm import GlobalMean as GlobalMean
from pnode_dist.nn.norm import GroupNorm as GroupNorm

__all__ = ["BatchNorm2d", "Conv2d", "GlobalMean", "GraphConv", "GroupNorm", "Linear", "MessagePassing", "convert"]
