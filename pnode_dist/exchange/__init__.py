"""Differentiable communication between the ranks of one state.

Every rank differentiates its own share of the loss, and the objective is the sum of the shares. The adjoint of an
exchange is then its transpose as a linear map over all ranks. `backward()` is collective if the forward call was.

Exchanges can be differentiated in reverse and in forward mode (torch.autograd.forward_ad, torch.func.vjp and jvp), and
in any nesting of the two. A tangent is exchanged like its value, so forward mode is collective too. All ranks must
differentiate the same exchanges.
"""

from pnode_dist.exchange.blocks import gather, scatter
from pnode_dist.exchange.fourier import fft, fft2, fftn, ifft, ifft2, ifftn, irfft, irfft2, irfftn, rfft, rfft2, rfftn
from pnode_dist.exchange.graph_ghosts import with_ghosts
from pnode_dist.exchange.grid_halo import halo, neighbour_halo, pad_edges
from pnode_dist.exchange.redistribution import redistribute
from pnode_dist.exchange.sums import global_sum, mesh_sum
from pnode_dist.exchange.vectors import gather_vector, reduce_vector

__all__ = [
    "fft",
    "fft2",
    "fftn",
    "gather",
    "gather_vector",
    "global_sum",
    "halo",
    "ifft",
    "ifft2",
    "ifftn",
    "irfft",
    "irfft2",
    "irfftn",
    "mesh_sum",
    "neighbour_halo",
    "pad_edges",
    "redistribute",
    "reduce_vector",
    "rfft",
    "rfft2",
    "rfftn",
    "scatter",
    "with_ghosts",
]
