"""Diffusion on an irregular mesh."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.graph_diffusion.config import GraphDiffusionRun

PROBLEM = ProblemDefinition(
    GraphDiffusionRun,
    "pnode_dist.problems.graph_diffusion.problem:GraphDiffusionProblem",
    "Learn diffusion on an irregular mesh by message passing.",
)
