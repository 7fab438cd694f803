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
    """The name of the problem."""
    data: Literal["digits", "cifar10", "synthetic"] = "digits"
    """The images. `digits`: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn. `cifar10`: 60,000 photographs
    of 32 x 32 pixels with 3 colours, read from `path`. `synthetic`: random images of that shape, for measurements."""
    path: Annotated[StrictStr | None, Field(validate_default=True)] = None
    """The folder of `cifar10`, in its published binary or Python form. Required for `cifar10`."""
    images: Count | None = None
    """The number of `synthetic` images. Default: 1,024."""
    seed: Seed = 0
    """Seed of the split of the images, and of `synthetic` images."""
    test: Share | None = None
    """The share of all images that only `evaluate` uses. Default: 0.2. `cifar10` comes with test images."""
    validation: Share = 0.1
    """The share of the remaining images for validation during training. 0 validates with the test images."""
    shift: CountOrNone = 0
    """Shift each training image by up to this many pixels in each direction, at random in each epoch. 0 disables."""
    flip: bool = False
    """Mirror half of the training images, at random in each epoch."""

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
        """The number of images to make."""
        return SYNTHETIC_IMAGES if self.images is None else self.images


class ImagesModelConfig(ModelTable):
    """The table `[model]` of an images problem: SqueezeNext; by default SqNxt_23_1x of the PNODE paper."""

    stem: Channels = 64
    """Channels of the first layer."""
    widths: Annotated[tuple[Channels, ...], Field(min_length=1)] = (32, 64, 128, 256)
    """Channels of each ODE block. A block solves du/dt = f(t, u) from t = 0 to 1."""
    strides: Annotated[tuple[Literal[1, 2], ...], Field(validate_default=True)] = (1, 2, 2, 2)
    """The stride before each ODE block: 2 halves the image in each direction. One entry for each of `widths`."""
    features: Count = 128
    """Channels of the last layer before the classifier."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The activation function between layers."""

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
    """Images per evaluated batch, over all replicas."""


class ImagesRun(Config):
    """A whole configuration of an images problem."""

    problem: ImagesConfig
    model: ImagesModelConfig = ImagesModelConfig()
    evaluation: ImagesEvaluationConfig = ImagesEvaluationConfig()
