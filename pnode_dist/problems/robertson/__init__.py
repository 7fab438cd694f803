"""Robertson's stiff chemical reactions."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.robertson.config import RobertsonRun

PROBLEM = ProblemDefinition(
    RobertsonRun,
    "pnode_dist.problems.robertson.problem:RobertsonProblem",
    "Learn a stiff reaction of three species by implicit steps.",
)
