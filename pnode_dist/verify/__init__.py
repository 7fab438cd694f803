"""Checks of gradients: against finite differences, by a Taylor test, and of every method."""

from pnode_dist.verify.gradcheck import GradcheckCase as GradcheckCase
from pnode_dist.verify.gradcheck import GradcheckResult as GradcheckResult
from pnode_dist.verify.gradcheck import gradcheck as gradcheck

__all__ = ["GradcheckCase", "GradcheckResult", "gradcheck"]
