"""Steady states f(t, u; theta) = 0 of partitioned states, differentiable in theta."""

from pnode_dist.steady.find import find
from pnode_dist.steady.settings import SteadySettings
from pnode_dist.steady.solve import SteadyState
from pnode_dist.steady.steady_state import steady_state

__all__ = ["SteadySettings", "SteadyState", "find", "steady_state"]
