"""The images problem once more: whole batches and a network in plain torch, files of CIFAR-10, small configurations."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pnode_dist.problems.images.config import ImagesRun
from pnode_dist.problems.images.model import SqueezeNext
from pnode_dist.problems.images.problem import ImagesProblem

Array = npt.NDArray[Any]

STEPS = 2
SMALL = {"stem": 4, "widths": (4, 8), "strides": (2, 1), "features": 8, "activation": "silu"}


def config(**tables: dict[str, Any]) -> ImagesRun:
    """A whole configuration of few digits and a small network; `tables` change single keys of its tables."""
    whole: dict[str, dict[str, Any]] = {
        "run": {"name": "test"},
        "problem": {"type": "images", "data": "digits", "test": 0.9, "validation": 0.4, "shift": 1},
        "model": SMALL,
        "solver": {"method": "midpoint", "step_size": 1 / STEPS},
        "training": {
            "epochs": 2,
            "batch_size": 21,
            "dtype": "float64",
            "optimiser": "sgd",
            "momentum": 0.9,
            "learning_rate": 0.05,
            "weight_decay": 1e-3,
        },
        "evaluation": {"batch_size": 50},
    }
    for name, changes in tables.items():
        whole[name] = whole.get(name, {}) | changes
    return ImagesRun.model_validate(whole)


class Midpoint(nn.Module):
    """u(1) by equal steps of the explicit midpoint rule."""

    def __init__(self, f: nn.Module, steps: int = STEPS) -> None:
        super().__init__()
        self.f, self.steps = f, steps

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        t, h = torch.zeros(()), 1 / self.steps
        for _ in range(self.steps):
            u = u + h * self.f(t, u + h / 2 * self.f(t, u))
        return u


def plain_network(problem: ImagesProblem) -> SqueezeNext:
    """The problem's network with plain solves and torch's batch norms, and the same numbers in it."""
    settings, data = problem.config.model, problem.data
    network = SqueezeNext(
        data.training.images.shape[-1],
        len(data.classes),
        Midpoint,
        stem=settings.stem,
        widths=settings.widths,
        strides=settings.strides,
        features=settings.features,
        activation=settings.activation,
    ).double()
    network.load_state_dict(renamed(problem.model.state_dict()))
    return network


def renamed(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the problem's network has, under the plain network's names."""
    return {name.replace(".solve.func.", ".f."): value for name, value in named.items()}


def whole_batches(problem: ImagesProblem, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images and labels of each training batch, varied one by one, however many ranks there are."""
    training, settings = problem.data.training, problem.config
    size, shift = settings.training.batch_size, settings.problem.shift
    order = np.random.default_rng([settings.run.seed, epoch]).permutation(len(training))
    generator = np.random.default_rng([3, settings.run.seed, epoch])
    shifts = generator.integers(-shift, shift, (len(training), 2), endpoint=True)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        images = np.stack([moved(training.images[number], *shifts[number]) for number in numbers])
        normalised = (torch.from_numpy(images).double() - problem.data.mean) / problem.data.deviation
        yield normalised, torch.from_numpy(training.labels[numbers])


def moved(image: Array, down: int, right: int) -> Array:
    """An image moved point by point, zeros where nothing comes from."""
    found = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                found[y, x] = image[y - down, x - right]
    return found


# CIFAR-10's files


def cifar_part(records: int, seed: int) -> tuple[Array, Array]:
    """Rows of 3,072 bytes, as the files have them, and labels."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (records, 3072), dtype=np.uint8), generator.integers(0, 10, records)


def binary_file(rows: Array, labels: Array) -> bytes:
    """A file of the binary form."""
    return b"".join(bytes([label]) + row.tobytes() for row, label in zip(rows, labels, strict=True))


def python_file(rows: Array, labels: Any) -> bytes:
    """A file of the Python form, opcode by opcode as cPickle of Python 2 wrote it; labels may be anything."""
    kind = b"cnumpy\ndtype\n" + _string(b"u1") + b"K\x00K\x01\x87R"
    kind += b"(K\x03" + _string(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    shape = b"J" + struct.pack("<i", len(rows)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    data = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _string(b"b") + b"\x87R"
    data += b"(K\x01" + shape + kind + b"\x89" + b"T" + struct.pack("<I", rows.size) + rows.tobytes() + b"tb"
    # Without what begins and ends a pickle.
    numbers = pickle.dumps(labels.tolist() if isinstance(labels, np.ndarray) else labels, protocol=2)[2:-1]
    names = b"](" + len(rows) * _string(b"leptodactylus_pentadactylus_s_000004.png") + b"e"
    entries = {b"batch_label": _string(b"a batch"), b"labels": numbers, b"data": data, b"filenames": names}
    return b"\x80\x02}(" + b"".join(_string(key) + value for key, value in entries.items()) + b"u."


def _string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text
