"""Configuration of the flows problem: which samples, the flow that is to have made them, and how it is judged.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictStr, ValidationInfo, field_validator

from pnode_dist.config.definition import ModelTable, ProblemTable
from pnode_dist.config.tables import Config, Count, NotNegative, Positive, Table
from pnode_dist.problems.common.tables import Seed

Cells = Annotated[int, Field(ge=2, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Matrix = tuple[tuple[Number, ...], ...]

PLANAR = ("moons", "rings", "pinwheel", "8gaussians", "checkerboard")
"""Densities in the plane, drawn from generators."""
EMBEDDED = ("breast_cancer", "diabetes", "iris", "wine")
"""Tables that scikit-learn brings with it."""
FILES = {"power": "power/data.npy", "miniboone": "miniboone/data.npy", "bsds300": "BSDS300/BSDS300.hdf5"}
"""Tables in the files of Papamakarios et al.: Masked autoregressive flow for density estimation, NeurIPS 2017."""


class FlowsConfig(ProblemTable):
    """The table `[problem]` with `type = "flows"`: samples whose density is to be learnt.

    `moons` to `checkerboard` are densities in the plane and `gaussian` is one of any dimension: samples to learn from,
    to validate with and to test on are drawn. `wine`, `breast_cancer`, `diabetes` and `iris` are tables that come with
    scikit-learn. `power`, `miniboone` and `bsds300` are read from `directory`, where they lie as in MAF's data.
    """

    type: Literal["flows"]
    density: Literal[
        "moons",
        "rings",
        "pinwheel",
        "8gaussians",
        "checkerboard",
        "gaussian",
        "breast_cancer",
        "diabetes",
        "iris",
        "wine",
        "power",
        "miniboone",
        "bsds300",
    ]
    samples: Count = 10_000
    """Drawn samples to learn from."""
    validation: Count = 2_000
    """Further drawn samples, by which training chooses parameters if asked to."""
    test: Count = 2_000
    """Further drawn samples that only `evaluate` sees."""
    seed: Seed = 0
    """Seeds what is drawn, and how an embedded table is split; nothing else."""
    mean: tuple[Number, ...] = ()
    """Of `gaussian`; by default zero."""
    covariance: Annotated[Matrix, Field(validate_default=True)] = ()
    """Of `gaussian`: the rows of a symmetric positive definite matrix."""
    directory: Annotated[StrictStr | None, Field(validate_default=True)] = None
    """Where the files of `power`, `miniboone` or `bsds300` lie, in folders of their own."""

    @field_validator("covariance")
    @classmethod
    def _of_the_gaussian(cls, value: Matrix, others: ValidationInfo) -> Matrix:
        density, size = others.data.get("density"), len(value)
        if density != "gaussian" and value:
            raise ValueError('must be given with density = "gaussian" only')
        if density == "gaussian" and (not value or any(len(row) != size for row in value)):
            raise ValueError('must be the rows of a square matrix with density = "gaussian"')
        mean = others.data.get("mean")
        if mean and len(mean) != size:
            raise ValueError(f"must be a matrix of {len(mean)} rows, as mean has {len(mean)} entries")
        return value

    @field_validator("directory")
    @classmethod
    def _of_the_files(cls, value: str | None, others: ValidationInfo) -> str | None:
        density = others.data.get("density")
        if density in FILES and value is None:
            raise ValueError(f"must be the folder that holds {FILES[density]}")
        if density not in FILES and value is not None:
            raise ValueError(f"must be given with density = {' or '.join(FILES)} only")
        return value


class FlowsModelConfig(ModelTable):
    """The table `[model]` of a flows problem: continuous flows, one after another, and what they are charged for."""

    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 64, 64)
    """Units of each hidden layer of a flow's velocity."""
    activation: Literal["silu", "softplus", "tanh"] = "tanh"
    flows: Count = 1
    """Flows, each with a velocity of its own."""
    time: Positive = 1.0
    """How long a flow lasts."""
    trace: Literal["exact", "hutchinson"] = "exact"
    """The trace of the velocity's Jacobian in training: `exact` costs as many derivatives as there are dimensions,
    `hutchinson` one, along noise that stays the same for a solve. Evaluations are exact."""
    noise: Literal["gaussian", "rademacher"] = "rademacher"
    """Hutchinson's noise: normally distributed, or signs."""
    whiten: bool = False
    """Let the flow begin with the linear map that makes the rows to learn from white: untrained, it is then near the
    normal distribution that fits them."""
    kinetic: NotNegative = 0.0
    """What the loss adds for each unit of a sample's squared speed, integrated over time."""
    jacobian: NotNegative = 0.0
    """What the loss adds for each unit of the squared Frobenius norm of the velocity's Jacobian at a sample, integrated
    over time."""


class FlowsEvaluationConfig(Table):
    """The table `[evaluation]` of a flows problem."""

    samples: Count = 2_000
    """Samples drawn from the flow."""
    cells: Cells = 160
    """Cells along each axis of the map of a density in the plane, over which it is integrated."""


class FlowsRun(Config):
    """A whole configuration of a flows problem."""

    problem: FlowsConfig
    model: FlowsModelConfig = FlowsModelConfig()
    evaluation: FlowsEvaluationConfig = FlowsEvaluationConfig()
