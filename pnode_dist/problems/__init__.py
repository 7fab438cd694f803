"""The built-in problems, and the one place that knows them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pnode_dist.mesh import Mesh
    from pnode_dist.problems.protocol import Problem
    from pnode_dist.train.config import Config


def build(config: Config, mesh: Mesh, dtype: torch.dtype) -> Problem:
    """The configured problem, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` for what can only be said with the data set and the mesh at hand: a file or variable
    that is not there, more ranks than rows, a window longer than the data.
    """
    from pnode_dist.train.config import (
        BurgersRun,
        FieldRun,
        FlowsRun,
        GraphDiffusionRun,
        GrayScottRun,
        ImagesRun,
        KuramotoSivashinskyRun,
        PendulumRun,
        RobertsonRun,
    )

    # Each problem needs packages of its own.
    match config:
        case FieldRun():
            from pnode_dist.problems.field import build_field

            return build_field(config, mesh, dtype)
        case GrayScottRun():
            from pnode_dist.problems.gray_scott import build_gray_scott

            return build_gray_scott(config, mesh, dtype)
        case KuramotoSivashinskyRun() | BurgersRun():
            from pnode_dist.problems.semilinear import build_semilinear

            return build_semilinear(config, mesh, dtype)
        case RobertsonRun():
            from pnode_dist.problems.robertson import build_robertson

            return build_robertson(config, mesh, dtype)
        case GraphDiffusionRun():
            from pnode_dist.problems.graph_diffusion import build_graph_diffusion

            return build_graph_diffusion(config, mesh, dtype)
        case PendulumRun():
            from pnode_dist.problems.pendulum import build_pendulum

            return build_pendulum(config, mesh, dtype)
        case FlowsRun():
            from pnode_dist.problems.flows import build_flows

            return build_flows(config, mesh, dtype)
        case ImagesRun():
            from pnode_dist.problems.images import build_images

            return build_images(config, mesh, dtype)
    raise TypeError(f"there is no problem for a {type(config).__name__}")
