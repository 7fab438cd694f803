"""Steady states f(t, u; theta) = 0 of partitioned states, differentiable in theta."""

from pnode_dist.steady.implicit_function import find
from pnode_dist.steady.interface import steady_state
from pnode_dist.steady.settings import SteadySettings
from pnode_dist.steady.solve import SteadyState

__all__ = ["SteadySettings", "SteadyState", "find", "steady_state"]
