"""`pnode_dist.distributed.gradients` under its former name."""

import warnings

from pnode_dist.distributed.gradients import broadcast_parameters as broadcast_parameters
from pnode_dist.distributed.gradients import clip_gradient_norm as clip_gradient_norm
from pnode_dist.distributed.gradients import parallel as parallel
from pnode_dist.distributed.gradients import share_of_mean as share_of_mean

__all__ = ["broadcast_parameters", "clip_gradient_norm", "parallel", "share_of_mean"]

warnings.warn(
    "pnode_dist.sync is deprecated: import pnode_dist.distributed.gradients", DeprecationWarning, stacklevel=2
)
