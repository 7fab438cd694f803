"""Two-layer quasi-geostrophic turbulence, whose sub-grid closure is learnt."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.qg.config import QGRun

PROBLEM = ProblemDefinition(
    QGRun,
    "pnode_dist.problems.qg.problem:QGProblem",
    "Learn the forcing by unresolved scales in two-layer quasi-geostrophic turbulence.",
)
