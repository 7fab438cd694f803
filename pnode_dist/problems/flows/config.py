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
    """The name of the problem."""
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
    """The samples: a density to draw from, a table of scikit-learn, or files in `directory`."""
    samples: Count = 10_000
    """The number of training samples, for densities to draw from."""
    validation: Count = 2_000
    """The number of validation samples, for densities to draw from."""
    test: Count = 2_000
    """The number of test samples, for densities to draw from. Only `evaluate` uses them."""
    seed: Seed = 0
    """Seed of the drawn samples, and of the split of a table of scikit-learn."""
    mean: tuple[Number, ...] = ()
    """The mean of `gaussian`. Default: zero."""
    covariance: Annotated[Matrix, Field(validate_default=True)] = ()
    """The covariance of `gaussian`, by rows: a symmetric positive definite matrix. Required for `gaussian`."""
    directory: Annotated[StrictStr | None, Field(validate_default=True)] = None
    """The folder of the files of `power`, `miniboone` or `bsds300`, each in a folder of its own. Required for these."""

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
    """Units of each hidden layer of the velocity."""
    activation: Literal["silu", "softplus", "tanh"] = "tanh"
    """The activation function between layers."""
    flows: Count = 1
    """The number of flows in sequence, each with its own velocity."""
    time: Positive = 1.0
    """The duration of a flow, dimensionless."""
    trace: Literal["exact", "hutchinson"] = "exact"
    """The trace of the Jacobian of the velocity during training. `exact` computes one derivative for each dimension.
    `hutchinson` estimates it by one derivative, along noise that is fixed during a solve. `evaluate` is always
    exact."""
    noise: Literal["gaussian", "rademacher"] = "rademacher"
    """The noise of `trace = "hutchinson"`: standard normal numbers, or random signs."""
    whiten: bool = False
    """Start the flow with the linear map that whitens the training samples. The untrained flow is then close to the
    normal distribution that fits them."""
    kinetic: NotNegative = 0.0
    """Weight in the loss of the squared speed of a sample, integrated over time. 0 disables."""
    jacobian: NotNegative = 0.0
    """Weight in the loss of the squared Frobenius norm of the Jacobian of the velocity, integrated over time. 0
    disables."""


class FlowsEvaluationConfig(Table):
    """The table `[evaluation]` of a flows problem."""

    samples: Count = 2_000
    """The number of samples to draw from the flow."""
    cells: Cells = 160
    """Cells along each axis of the grid on which a density in the plane is drawn and integrated."""


class FlowsRun(Config):
    """A whole configuration of a flows problem."""

    problem: FlowsConfig
    model: FlowsModelConfig = FlowsModelConfig()
    evaluation: FlowsEvaluationConfig = FlowsEvaluationConfig()
