"""The Gray-Scott equations."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.gray_scott.config import GrayScottRun

PROBLEM = ProblemDefinition(
    GrayScottRun,
    "pnode_dist.problems.gray_scott.problem:GrayScottProblem",
    "Learn how two species react and diffuse on a periodic plane.",
)
