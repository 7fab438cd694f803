"""The registry of the built-in problems: their configurations, reading one, and building a problem.

Neither torch nor PETSc is imported to read a configuration, so that a wrong one is answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pnode_dist.config.diagnosis import first_error, wrong_choice
from pnode_dist.config.reading import apply_override, read_tables
from pnode_dist.config.tables import Config
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.config import FieldRun
from pnode_dist.problems.flows.config import FlowsRun
from pnode_dist.problems.graph_diffusion.config import GraphDiffusionRun
from pnode_dist.problems.gray_scott.config import GrayScottRun
from pnode_dist.problems.images.config import ImagesRun
from pnode_dist.problems.pendulum.config import PendulumRun
from pnode_dist.problems.robertson.config import RobertsonRun
from pnode_dist.problems.semilinear.config import BurgersRun, KuramotoSivashinskyRun

if TYPE_CHECKING:
    import torch

    from pnode_dist.distributed.mesh import Mesh
    from pnode_dist.train.problem import Problem

RUNS: dict[str, type[Config]] = {
    "field": FieldRun,
    "gray_scott": GrayScottRun,
    "kuramoto_sivashinsky": KuramotoSivashinskyRun,
    "burgers": BurgersRun,
    "robertson": RobertsonRun,
    "pendulum": PendulumRun,
    "graph_diffusion": GraphDiffusionRun,
    "flows": FlowsRun,
    "images": ImagesRun,
}
"""The configuration that each `[problem] type` needs; without a type the problem is `field`."""


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read and validate a configuration file, with `section.key=value` overrides put over it.

    An override's value is read as a TOML value, and as a string if it is none.
    Raises `ConfigurationError`: one line with the file, the key, its value and what is allowed.
    """
    path = Path(path)
    tables = read_tables(path)
    sources = {}
    for override in overrides:
        sources[apply_override(tables, override)] = f"--set {override}"
    run = tables.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
    problem = tables.get("problem")
    kind = problem.get("type", "field") if isinstance(problem, dict) else "field"
    if not isinstance(kind, str) or kind not in RUNS:
        raise ConfigurationError(wrong_choice(("problem", "type"), kind, list(RUNS), str(path), sources))
    try:
        return RUNS[kind].model_validate(tables)
    except ValidationError as error:
        raise ConfigurationError(first_error(error, RUNS[kind], str(path), sources)) from None


def build(config: Config, mesh: Mesh, dtype: torch.dtype) -> Problem:
    """The configured problem, its model computing in `dtype`. Collective on the world.

    Raises `ConfigurationError` for what can only be said with the data set and the mesh at hand: a file or variable
    that is not there, more ranks than rows, a window longer than the data.
    """
    # Each problem needs packages of its own.
    match config:
        case FieldRun():
            from pnode_dist.problems.field.problem import build_field

            return build_field(config, mesh, dtype)
        case GrayScottRun():
            from pnode_dist.problems.gray_scott.problem import build_gray_scott

            return build_gray_scott(config, mesh, dtype)
        case KuramotoSivashinskyRun() | BurgersRun():
            from pnode_dist.problems.semilinear.problem import build_semilinear

            return build_semilinear(config, mesh, dtype)
        case RobertsonRun():
            from pnode_dist.problems.robertson.problem import build_robertson

            return build_robertson(config, mesh, dtype)
        case GraphDiffusionRun():
            from pnode_dist.problems.graph_diffusion.problem import build_graph_diffusion

            return build_graph_diffusion(config, mesh, dtype)
        case PendulumRun():
            from pnode_dist.problems.pendulum.problem import build_pendulum

            return build_pendulum(config, mesh, dtype)
        case FlowsRun():
            from pnode_dist.problems.flows.problem import build_flows

            return build_flows(config, mesh, dtype)
        case ImagesRun():
            from pnode_dist.problems.images.problem import build_images

            return build_images(config, mesh, dtype)
    raise TypeError(f"there is no problem for a {type(config).__name__}")
