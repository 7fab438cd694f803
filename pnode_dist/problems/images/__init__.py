"""Classification of images."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.images.config import ImagesRun

PROBLEM = ProblemDefinition(
    ImagesRun,
    "pnode_dist.problems.images.problem:ImagesProblem",
    "Classify images by a network with ODE blocks.",
)
