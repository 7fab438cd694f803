"""`pnode_dist.distributed.sampler` under its former name."""

import warnings

from pnode_dist.distributed.sampler import ReplicaSampler as ReplicaSampler

__all__ = ["ReplicaSampler"]

warnings.warn(
    "pnode_dist.sampler is deprecated: import pnode_dist.distributed.sampler", DeprecationWarning, stacklevel=2
)
