"""Continuous normalising flows."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.flows.config import FlowsRun

PROBLEM = ProblemDefinition(
    FlowsRun,
    "pnode_dist.problems.flows.problem:FlowsProblem",
    "Learn a density from samples by a continuous normalising flow.",
)
