"""`pnode_dist.distributed.sharding` under its former name."""

import warnings

from pnode_dist.distributed.sharding import Shard as Shard
from pnode_dist.distributed.sharding import Sharded as Sharded
from pnode_dist.distributed.sharding import gather_state_dict as gather_state_dict
from pnode_dist.distributed.sharding import load_whole_state_dict as load_whole_state_dict
from pnode_dist.distributed.sharding import shards_of as shards_of

__all__ = ["Shard", "Sharded", "gather_state_dict", "load_whole_state_dict", "shards_of"]

warnings.warn(
    "pnode_dist.sharding is deprecated: import pnode_dist.distributed.sharding", DeprecationWarning, stacklevel=2
)
