"""Semilinear equations on a periodic line: Kuramoto-Sivashinsky and Burgers."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.semilinear.config import BurgersRun, KuramotoSivashinskyRun

KURAMOTO_SIVASHINSKY = ProblemDefinition(
    KuramotoSivashinskyRun,
    "pnode_dist.problems.semilinear.problem:SemilinearProblem",
    "Learn the nonlinear part of the Kuramoto-Sivashinsky equation.",
)
BURGERS = ProblemDefinition(
    BurgersRun,
    "pnode_dist.problems.semilinear.problem:SemilinearProblem",
    "Learn the nonlinear part of the viscous Burgers equation.",
)
