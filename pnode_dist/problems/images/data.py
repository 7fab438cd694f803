"""Data of the images problem: labelled images in three parts, and random variations of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.images import cifar10
from pnode_dist.problems.images.config import ImagesConfig

Integers = npt.NDArray[np.int64]

_SPLIT, _SYNTHETIC, _MOVES = 1, 2, 3
_SYNTHETIC_EDGE, _SYNTHETIC_WAVES, _NOISE = 32, 4, 40.0


@dataclass(frozen=True)
class LabelledImages:
    """Images `[samples, y, x, channels]` of bytes, and their class indices `[samples]`."""

    images: npt.NDArray[np.uint8]
    labels: Integers

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, numbers: Integers) -> LabelledImages:
        """Return the images with the given indices, in that order."""
        return LabelledImages(self.images[numbers], self.labels[numbers])


@dataclass(frozen=True)
class ImageData:
    """All images, whole on every rank: for training, validation and test.

    Without a validation part, `validation` is the test part. `mean` and `deviation` `[channels]`, float64, are over the
    points of the training images.
    """

    training: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def watched(self) -> str:
        """Name of the part used as `validation`."""
        return "test" if self.validation is self.test else "validation"

    def normalised(self, images: npt.NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
        """Subtract the mean of each channel and divide by its deviation, in `dtype`."""
        return ((torch.from_numpy(images).double() - self.mean) / self.deviation).to(dtype)


@dataclass(frozen=True)
class Augmentation:
    """Variations of each training image in one epoch: shifts in y and x in points, and reflections.

    `shifts` is `[samples, 2]`, `mirrored` `[samples]`.
    """

    shifts: Integers
    mirrored: npt.NDArray[np.bool_]

    def of(self, images: npt.NDArray[np.uint8], numbers: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return the varied images with these indices. Points shifted in at an edge are 0."""
        shifts, mirrored = self.shifts[list(numbers)], self.mirrored[list(numbers)]
        edge = int(np.abs(self.shifts).max(initial=0))
        padded = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        height, width = images.shape[1:3]
        columns = np.arange(width)
        from_rows = np.arange(height) + edge - shifts[:, :1]
        from_columns = np.where(mirrored[:, None], columns[::-1], columns) + edge - shifts[:, 1:]
        sample = np.arange(len(images))[:, None, None]
        moved: npt.NDArray[np.uint8] = padded[sample, from_rows[:, :, None], from_columns[:, None, :]]
        return moved


def draw_augmentation(config: ImagesConfig, samples: int, seed: int, epoch: int) -> Augmentation:
    """Draw the variations of the training images in an epoch from `seed` and `epoch`. Not collective."""
    generator = np.random.default_rng([_MOVES, seed, epoch])
    shifts = generator.integers(-config.shift, config.shift, (samples, 2), endpoint=True)
    mirrored = generator.random(samples) < 0.5
    return Augmentation(shifts, mirrored & config.flip)


def load_images(config: ImagesConfig, mesh: Mesh) -> ImageData:
    """Load and split the configured images. Collective on the world.

    Raises `ConfigurationError` on all ranks if files are missing or damaged, if scikit-learn is needed but missing, or
    if a part would have no image.
    """
    return agreed(mesh, lambda: _load(config))


def _load(config: ImagesConfig) -> ImageData:
    generator = np.random.default_rng([_SPLIT, config.seed])
    classes: tuple[str, ...]
    if config.data == "cifar10":
        training, test = (LabelledImages(*part) for part in cifar10.read_cifar10(str(config.path)))
        classes = cifar10.CLASSES
    else:
        whole, classes = _digits() if config.data == "digits" else _synthetic(config)
        training, test = split(whole, config.test_share, "test", generator)
    validation = test
    if config.validation > 0:
        training, validation = split(training, config.validation, "validation", generator)
    points = training.images.reshape(-1, training.images.shape[-1])
    mean, deviation = (torch.from_numpy(np.atleast_1d(f(points, axis=0, dtype=np.float64))) for f in (np.mean, np.std))
    return ImageData(training, validation, test, classes, mean, torch.where(deviation > 0, deviation, 1.0))


def split(
    whole: LabelledImages, share: float, name: str, generator: np.random.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Split off a part with `share` of the images of every class. Returns the rest and the part, in original order.

    Raises `ConfigurationError` if either has no image.
    """
    taken = np.zeros(len(whole), dtype=bool)
    for label in np.unique(whole.labels):
        numbers = generator.permutation(np.flatnonzero(whole.labels == label))
        taken[numbers[: round(share * len(numbers))]] = True
    if taken.all() or not taken.any():
        raise ConfigurationError(f"[problem] {name} = {share}: leaves a part of {len(whole)} images without any")
    return whole.at(np.flatnonzero(~taken)), whole.at(np.flatnonzero(taken))


def _digits() -> tuple[LabelledImages, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ConfigurationError(
            "[problem] data = 'digits': the images come with scikit-learn, which is missing: "
            "pip install 'pnode-dist[data]'"
        ) from None
    found = load_digits()
    images = found.images.astype(np.uint8)[..., None]
    return LabelledImages(images, found.target.astype(np.int64)), tuple(str(name) for name in found.target_names)


def _synthetic(config: ImagesConfig) -> tuple[LabelledImages, tuple[str, ...]]:
    """Generate images of ten coloured waves with noise, with the classes in turn."""
    generator = np.random.default_rng([_SYNTHETIC, config.seed])
    labels = np.arange(config.synthetic_images) % 10
    y, x = np.meshgrid(*2 * [np.arange(_SYNTHETIC_EDGE) / _SYNTHETIC_EDGE], indexing="ij")
    waves = generator.integers(0, _SYNTHETIC_WAVES, (10, 2, 3), endpoint=True)
    phases = generator.random((10, 3))
    angles = y[..., None] * waves[:, None, None, 0] + x[..., None] * waves[:, None, None, 1] + phases[:, None, None]
    patterns = 128 + 80 * np.sin(2 * np.pi * angles)
    noisy: Any = patterns[labels] + _NOISE * generator.standard_normal((len(labels), *patterns.shape[1:]))
    images = np.clip(noisy, 0, 255).astype(np.uint8)
    return LabelledImages(images, labels), tuple(f"wave {number}" for number in range(10))
