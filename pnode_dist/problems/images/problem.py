"""Images problem: classify images by a convolutional network with ODE blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pnode_dist.distributed.gradients import share_of_mean
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.nn.sync_batch_norm import SyncBatchNorm
from pnode_dist.ode.planning import SolveCase
from pnode_dist.partition.batch import BatchPartition
from pnode_dist.partition.protocol import even_ranges
from pnode_dist.problems.common.batches import check_replicas, shared
from pnode_dist.problems.common.solver import check_checkpoint, neural_ode
from pnode_dist.problems.common.trainable import FORECAST, TrainableProblem
from pnode_dist.problems.images.data import ImageData, LabelledImages, draw_augmentation, load_images
from pnode_dist.problems.images.model import OdeBlock, SqueezeNext
from pnode_dist.report.dataset_file import Variable, write_dataset
from pnode_dist.verify.gradcheck import GradcheckCase

if TYPE_CHECKING:
    from pnode_dist.problems.images.config import ImagesRun

_CHECKED_IMAGES = 32


@dataclass(frozen=True)
class ImageBatch:
    """This rank's images of a batch, normalised, `[samples_local, y, x, channels]`, and their class indices.

    `numbers` are the indices of the replica's images in their part. Each state rank holds consecutive ones.
    """

    images: torch.Tensor
    labels: torch.Tensor
    numbers: tuple[int, ...]


def _check_sizes(config: ImagesRun, data: ImageData, mesh: Mesh, dtype: torch.dtype) -> None:
    """Raise `ConfigurationError` if no checkpoint of a batch fits the trajectory, or a batch has no variance.

    Collective on the state ranks.
    """
    height, width, values = *data.training.images.shape[1:3], 0
    for channels, stride in zip(config.model.widths, config.model.strides, strict=True):
        height, width = -(-height // stride), -(-width // stride)
        values = max(values, height * width * channels)
    size = config.training.batch_size
    smallest = min(len(data.training), size, len(data.training) % size or size)
    if smallest * height * width == 1:
        raise ConfigurationError(
            f"[training] batch_size = {size}: leaves a batch of one image of one point before the classes, which has "
            "no variance: must be another, or [model] strides smaller"
        )
    samples = -(-math.ceil(size / mesh.data_replicas) // mesh.state_ranks)
    check_checkpoint(config, samples * values, dtype, (0.0, 1.0), mesh.state_comm, solves=len(config.model.widths))


def _model(config: ImagesRun, data: ImageData, mesh: Mesh, dtype: torch.dtype) -> SqueezeNext:
    """Build the network, with parameters determined by the run's seed. Its solves share one budget."""
    settings = config.model
    trajectory = config.trajectory.build(len(settings.widths))

    def block(f: nn.Module) -> nn.Module:
        return OdeBlock(neural_ode(config, f, None, trajectory=trajectory, last_only=True), mesh)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        network = SqueezeNext(
            data.training.images.shape[-1],
            len(data.classes),
            block,
            stem=settings.stem,
            widths=settings.widths,
            strides=settings.strides,
            features=settings.features,
            activation=settings.activation,
            normalisation=partial(SyncBatchNorm, mesh),
        )
    network.to(dtype)
    for value in network.parameters():
        # Convolutions of channels-last images return gradients in a different layout than DistributedDataParallel
        # keeps.
        value.register_hook(_in_order_of_axes)  # type: ignore[no-untyped-call]
    return network


def _in_order_of_axes(gradient: torch.Tensor) -> torch.Tensor:
    """Return the same values with contiguous strides, also along axes of length 1."""
    return gradient.flatten().view(gradient.shape)


class ImagesProblem(TrainableProblem):
    """Classification of images by a convolutional network with ODE blocks.

    A state is a batch of images with its samples distributed over the state ranks. Batch norms use statistics over all
    ranks, so the replicas train as one model.
    """

    config: ImagesRun
    plots = "pnode_dist.problems.images.plots"

    def __init__(self, config: ImagesRun, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__(config, mesh, dtype)
        if config.training.keep == "best" and config.problem.validation == 0:
            raise ConfigurationError(
                '[training] keep = "best": needs images that it is not judged by to choose by: [problem] validation '
                "must be greater than 0"
            )
        self.data = load_images(config.problem, mesh)
        check_replicas(config, mesh, len(self.data.training), "image")
        _check_sizes(config, self.data, mesh, dtype)
        self._model = _model(config, self.data, mesh, dtype)

    @property
    def model(self) -> SqueezeNext:
        """Network of the problem."""
        return self._model

    @property
    def partition(self) -> BatchPartition:
        """Distribution of the largest share of a batch over the state ranks."""
        share = math.ceil(self.config.training.batch_size / self.mesh.data_replicas)
        return BatchPartition(self.mesh, share, self.data.training.images.shape[1:])

    def batches(self, epoch: int, done: int = 0) -> Iterator[ImageBatch]:
        """Return this rank's training images of an epoch, shuffled and varied by (seed, epoch)."""
        training = self.data.training
        moves = draw_augmentation(self.config.problem, len(training), self.config.run.seed, epoch)
        for numbers in shared(range(len(training)), self.config, self.mesh, epoch, done):
            mine = self._mine(numbers)
            batch = self._batch(training, numbers)
            varied = moves.of(training.images[list(mine)], mine)
            yield dataclasses.replace(batch, images=self.data.normalised(varied, self.dtype))

    def loss(self, model: nn.Module, batch: ImageBatch) -> torch.Tensor:
        """Return this rank's share of the mean cross entropy, in nats."""
        entropy = functional.cross_entropy(model(batch.images), batch.labels, reduction="sum")
        return share_of_mean(entropy, len(batch.numbers), self.mesh)

    def validation(self, model: nn.Module) -> dict[str, float]:
        """Return the share of misclassified validation images, and the mean cross entropy."""
        part, name = self.data.validation, self.data.watched
        scores = self._scores(model, part)
        labels = torch.from_numpy(part.labels)
        return {
            f"{name}_error": (scores.argmax(dim=1) != labels).double().mean().item(),
            f"{name}_loss": functional.cross_entropy(scores, labels).item(),
        }

    def solve_case(self) -> SolveCase:
        """Return the first group's solve of the first training batch."""
        block = self.model.blocks[0]
        assert isinstance(block, OdeBlock)
        with torch.no_grad():
            state = self.model.first_state(next(self.batches(1)).images)
        block.place(state)
        return SolveCase(block.solve, state, (0.0, 1.0))

    def gradcheck_case(self) -> GradcheckCase:
        """Return the training loss of the first images as a function of these images.

        Raises `ConfigurationError` for an activation with a kink, where the derivative does not exist.
        """
        if self.config.model.activation == "relu":
            raise ConfigurationError(
                '[model] activation = "relu": has a kink, on both sides of which differences are taken: check the '
                "gradient with --set model.activation=silu"
            )
        numbers = range(min(_CHECKED_IMAGES, len(self.data.training)))
        batch = self._batch(self.data.training, numbers)

        def loss(images: torch.Tensor) -> torch.Tensor:
            return self.loss(self.model, dataclasses.replace(batch, images=images))

        partition = BatchPartition(self.mesh, len(numbers), self.data.training.images.shape[1:])
        return GradcheckCase(batch.images.clone().requires_grad_(), loss, tuple(self.model.parameters()), partition)

    def evaluate(self, model: nn.Module, run_directory: Path) -> dict[str, Any]:
        """Count the test images of each class that are classified correctly; writes `forecast.h5` and `report.png`.

        The recall of a class is the share of its images that are predicted as this class. The precision is the share of
        the images predicted as this class that belong to it, or None without such images. Each row of the confusion
        matrix counts the images of a class by predicted class.
        """
        test, classes = self.data.test, self.data.classes
        scores = self._scores(model, test)
        labels, taken = torch.from_numpy(test.labels), scores.argmax(dim=1)
        counts = torch.bincount(labels * len(classes) + taken, minlength=len(classes) ** 2).view(2 * [len(classes)])
        rows = [
            {
                "class": name,
                "images": int(counts[number].sum()),
                "recall": _share(counts[number, number], counts[number].sum()),
                "precision": _share(counts[number, number], counts[:, number].sum()),
            }
            for number, name in enumerate(classes)
        ]
        result: dict[str, Any] = {
            "problem": self.name,
            "data": self.config.problem.data,
            "watched": self.data.watched,
            "training_images": len(self.data.training),
            "test_images": len(test),
            "parameters": sum(value.numel() for value in self.model.parameters()),
            "accuracy": _share(counts.diagonal().sum(), counts.sum()),
            "misclassified": int((labels != taken).sum()),
            "cross_entropy": functional.cross_entropy(scores, labels).item(),
            "classes": rows,
            "confusion": [
                {"class": name, **dict(zip(classes, row, strict=True))}
                for name, row in zip(classes, counts.tolist(), strict=True)
            ],
        }
        variables = {
            "image": Variable(("sample", "y", "x", "channel"), test.images),
            "label": Variable(("sample",), test.labels),
            "probability": Variable(("sample", "class"), scores.softmax(dim=1)),
            "class": Variable(("class",), np.array(classes)),
        }
        write_dataset(run_directory / FORECAST, variables, self.mesh)
        return self.illustrated(result, run_directory)

    def _mine(self, numbers: Sequence[int]) -> Sequence[int]:
        """Return the indices of this rank's images among those of a replica."""
        begin, end = even_ranges(len(numbers), self.mesh.state_ranks)[self.mesh.state_rank]
        return numbers[begin:end]

    def _batch(self, part: LabelledImages, numbers: Sequence[int]) -> ImageBatch:
        """Return this rank's images of those with the given indices, without variations."""
        mine = part.at(np.array(self._mine(numbers), dtype=np.int64))
        images = self.data.normalised(mine.images, self.dtype)
        return ImageBatch(images, torch.from_numpy(mine.labels), tuple(numbers))

    def _scores(self, model: nn.Module, part: LabelledImages) -> torch.Tensor:
        """Return the scores `[samples, classes]` of all images of a part, on every rank, float64.

        The replicas share the work. Collective on the world.
        """
        scores = torch.zeros(len(part), len(self.data.classes), dtype=torch.float64)
        size = math.ceil(self.config.evaluation.batch_size / self.mesh.data_replicas)
        starts = range(0, len(part), size)[self.mesh.replica :: self.mesh.data_replicas]
        for start in starts:
            numbers = range(start, min(start + size, len(part)))
            scores[list(self._mine(numbers))] = model(self._batch(part, numbers).images).detach().double()
        return self.mesh.sum(scores)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    return part.item() / whole.item() if whole > 0 else None
