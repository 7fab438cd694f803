"""Configuration of the images problem: which images, how they are varied in training, and the network.

Nothing here imports torch or opens the data, so that a configuration is validated at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictStr, ValidationInfo, field_validator

from pnode_dist.config.definition import ModelTable, ProblemTable
from pnode_dist.config.tables import Config, Count, CountOrNone, Table
from pnode_dist.problems.common.tables import Seed

Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
Channels = Annotated[int, Field(ge=4, multiple_of=4, strict=True)]

TEST_SHARE, SYNTHETIC_IMAGES = 0.2, 1024


class ImagesConfig(ProblemTable):
    """The table `[problem]` with `type = "images"`: images of 10 classes, to be told apart.

    Classes have the same shares in all parts that the images are split into.
    """

    type: Literal["images"]
    data: Literal["digits", "cifar10", "synthetic"] = "digits"
    """`digits`: 1,797 handwritten digits of 8 x 8 points, which scikit-learn brings. `cifar10`: 60,000 photographs of
    3 x 32 x 32. `synthetic`: seeded images of that shape, to measure costs with."""
    path: Annotated[StrictStr | None, Field(validate_default=True)] = None
    """The folder of `cifar10`, in its published binary or Python form."""
    images: Count | None = None
    """How many of `synthetic` there are, by default 1,024."""
    seed: Seed = 0
    """Seeds how the images are split, and what synthetic ones show."""
    test: Share | None = None
    """The share of all images that `evaluate` judges by, by default 0.2. `cifar10` has a test part of its own."""
    validation: Share = 0.1
    """The share of the other images that training is watched with. With 0 the test part is watched."""
    shift: CountOrNone = 0
    """Training images are moved by up to so many points in each direction, in every epoch anew."""
    flip: bool = False
    """Half of the training images are mirrored, in every epoch others."""

    @field_validator("path")
    @classmethod
    def _of_a_folder(cls, value: str | None, others: ValidationInfo) -> str | None:
        if others.data.get("data") == "cifar10":
            if value is None or not value.strip():
                raise ValueError('must be the folder of CIFAR-10 with data = "cifar10"')
        elif value is not None:
            raise ValueError('must be left out unless data = "cifar10"')
        return value

    @field_validator("images")
    @classmethod
    def _of_synthetic(cls, value: int | None, others: ValidationInfo) -> int | None:
        if value is not None and others.data.get("data") != "synthetic":
            raise ValueError('must be left out unless data = "synthetic"')
        return value

    @field_validator("test")
    @classmethod
    def _to_be_split_off(cls, value: float | None, others: ValidationInfo) -> float | None:
        if value is not None and others.data.get("data") == "cifar10":
            raise ValueError('must be left out with data = "cifar10", which has a test part of its own')
        if value == 0:
            raise ValueError("must be greater than 0, or there is nothing to judge by")
        return value

    @field_validator("flip")
    @classmethod
    def _has_mirror_images(cls, value: bool, others: ValidationInfo) -> bool:
        if value and others.data.get("data") == "digits":
            raise ValueError('must be false with data = "digits": a mirrored digit is none')
        return value

    @property
    def test_share(self) -> float:
        """`test` where the images are split here."""
        return TEST_SHARE if self.test is None else self.test

    @property
    def synthetic_images(self) -> int:
        """How many images to make."""
        return SYNTHETIC_IMAGES if self.images is None else self.images


class ImagesModelConfig(ModelTable):
    """The table `[model]` of an images problem: SqueezeNext; by default SqNxt_23_1x of the PNODE paper."""

    stem: Channels = 64
    """Channels of the first layer."""
    widths: Annotated[tuple[Channels, ...], Field(min_length=1)] = (32, 64, 128, 256)
    """Channels of each residual group, whose solve is of f(t, u) from t = 0 to 1."""
    strides: Annotated[tuple[Literal[1, 2], ...], Field(validate_default=True)] = (1, 2, 2, 2)
    """2 where a group has half of the points before it in each direction."""
    features: Count = 128
    """Channels of the last layer before the classes."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"

    @field_validator("strides")
    @classmethod
    def _for_each_group(cls, value: tuple[int, ...], others: ValidationInfo) -> tuple[int, ...]:
        widths = others.data.get("widths")
        if widths is not None and len(value) != len(widths):
            raise ValueError(f"must be a list of {len(widths)} entries, one for each of widths")
        return value


class ImagesEvaluationConfig(Table):
    """The table `[evaluation]` of an images problem."""

    batch_size: Count = 256
    """Images, of all replicas together, that are looked at at a time."""


class ImagesRun(Config):
    """A whole configuration of an images problem."""

    problem: ImagesConfig
    model: ImagesModelConfig = ImagesModelConfig()
    evaluation: ImagesEvaluationConfig = ImagesEvaluationConfig()
