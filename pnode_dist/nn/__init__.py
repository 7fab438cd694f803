"""Layers for partitioned states: torch.nn's names, arguments and weights, with the communication inside."""

from pnode_dist.nn.conv import Conv1d as Conv1d
from pnode_dist.nn.conv import Conv2d as Conv2d
from pnode_dist.nn.conv import Conv3d as Conv3d
from pnode_dist.nn.convert import convert as convert
from pnode_dist.nn.ksp_solve import KSPSolve as KSPSolve
from pnode_dist.nn.linear import Linear as Linear
from pnode_dist.nn.message_passing import GraphConv as GraphConv
from pnode_dist.nn.message_passing import MessagePassing as MessagePassing
from pnode_dist.nn.norm import BatchNorm1d as BatchNorm1d
from pnode_dist.nn.norm import BatchNorm2d as BatchNorm2d
from pnode_dist.nn.norm import BatchNorm3d as BatchNorm3d
from pnode_dist.nn.norm import GlobalMean as GlobalMean
from pnode_dist.nn.norm import GroupNorm as GroupNorm
from pnode_dist.nn.norm import LayerNorm as LayerNorm
from pnode_dist.nn.poisson import Poisson as Poisson
from pnode_dist.nn.pool import AvgPool1d as AvgPool1d
from pnode_dist.nn.pool import AvgPool2d as AvgPool2d
from pnode_dist.nn.pool import AvgPool3d as AvgPool3d
from pnode_dist.nn.pool import MaxPool1d as MaxPool1d
from pnode_dist.nn.pool import MaxPool2d as MaxPool2d
from pnode_dist.nn.pool import MaxPool3d as MaxPool3d
from pnode_dist.nn.spectral_conv import SpectralConv1d as SpectralConv1d
from pnode_dist.nn.spectral_conv import SpectralConv2d as SpectralConv2d
from pnode_dist.nn.spectral_conv import SpectralConv3d as SpectralConv3d
from pnode_dist.nn.spectral_filter import SpectralFilter as SpectralFilter
from pnode_dist.nn.stack import Stack as Stack
from pnode_dist.nn.sync_batch_norm import SyncBatchNorm as SyncBatchNorm
from pnode_dist.nn.upsample import Upsample as Upsample

__all__ = [
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "GlobalMean",
    "GraphConv",
    "GroupNorm",
    "KSPSolve",
    "LayerNorm",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MessagePassing",
    "Poisson",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralFilter",
    "Stack",
    "SyncBatchNorm",
    "Upsample",
    "convert",
]
