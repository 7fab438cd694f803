"""CIFAR-10's files in both published forms, and what is said of damaged ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.images import cifar10
from pnode_dist.problems.images.cifar10 import read_cifar10
from tests.unit.problems.images.plain_images import binary_file, cifar_part, python_file

RECORDS = 3
NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
FORMS: dict[str, tuple[str, Callable[[Any, Any], bytes]]] = {
    "binary": (".bin", binary_file),
    "python": ("", python_file),
}


@pytest.fixture(autouse=True)
def _few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)


def write(folder: Path, form: str) -> None:
    suffix, content = FORMS[form]
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(NAMES):
        (folder / f"{name}{suffix}").write_bytes(content(*cifar_part(RECORDS, seed)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inside", [False, True], ids=["the folder itself", "the folder it was unpacked in"])
def test_both_forms_hold_the_same_images_and_labels(tmp_path: Path, form: str, inside: bool) -> None:
    archive = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}[form]
    write(tmp_path / archive if inside else tmp_path, form)
    training, test = read_cifar10(str(tmp_path))
    for (images, labels), seeds in ((training, range(5)), (test, (5,))):
        parts = [cifar_part(RECORDS, seed) for seed in seeds]
        assert labels.tolist() == [label for _, part in parts for label in part]
        rows = np.concatenate([rows for rows, _ in parts])
        assert images.shape == (len(rows), 32, 32, 3)
        assert images.dtype == np.uint8
        for number, y, x, channel in ((0, 0, 1, 0), (1, 31, 2, 1), (2, 4, 30, 2)):
            assert images[number, y, x, channel] == rows[number, channel * 1024 + y * 32 + x]


def labelled(labels: Any) -> bytes:
    """A file of the Python form with these labels."""
    return python_file(cifar_part(RECORDS, 0)[0], labels)


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


BINARY = binary_file(*cifar_part(RECORDS, 0))
PYTHON = python_file(*cifar_part(RECORDS, 0))
DAMAGED = {
    "half of a file": (".bin", BINARY[:5000], "data_batch_2.bin has 5000 bytes: must have 9219, 3 records of 3073"),
    "an empty file": (".bin", b"", "data_batch_2.bin has 0 bytes: must have 9219"),
    "a label of no class": (
        ".bin",
        BINARY[:3073] + b"\x0a" + BINARY[3074:],
        "data_batch_2.bin has the label 10 in record 1: must be 0 to 9",
    ),
    "a missing file": (".bin", None, "data_batch_2.bin is missing: must be there beside the others"),
    "half of a pickle": (
        "",
        PYTHON[:5000],
        "data_batch_2 is damaged: must be a pickle of CIFAR-10's data and",
    ),
    "no pickle": ("", b"<html>", "data_batch_2 is damaged: must be a pickle"),
    "a pickle of something else": ("", pickle.dumps([1]), "data_batch_2 is damaged: must be a pickle"),
    "a pickle without labels": ("", pickle.dumps({b"data": 1}), "data_batch_2 is damaged: must be a pickle"),
    "fewer images": (
        "",
        python_file(*cifar_part(RECORDS - 1, 0)),
        "data_batch_2 has other data than bytes of the shape (3, 3072)",
    ),
    "labels that are no list": ("", labelled(3), "data_batch_2 has other labels than a list of 3 integers"),
    "labels that are words": ("", labelled(["a", "b", "c"]), "has other labels than a list of 3 integers"),
    "a negative label": ("", labelled([0, -1, 2]), "has the label -1 in record 1: must be 0 to 9"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_with_what_it_must_be(tmp_path: Path, damage: str) -> None:
    suffix, content, message = DAMAGED[damage]
    write(tmp_path, "binary" if suffix else "python")
    path = tmp_path / f"data_batch_2{suffix}"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        read_cifar10(str(tmp_path))
    line = str(caught.value)
    assert line.startswith(f"[problem] path = {str(tmp_path)!r}: ")
    assert message in line
    assert "\n" not in line


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    write(tmp_path, "python")
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Attack(tmp_path / "harm"), b"labels": []}))
    with pytest.raises(ConfigurationError, match=r"data_batch_1 is damaged: .* \(UnpicklingError\)$"):
        read_cifar10(str(tmp_path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("name", "state"), [("nowhere", "there is no such folder"), ("", "has none of them")], ids=["none", "empty"]
)
def test_a_folder_without_the_files_is_named_with_those_that_it_must_have(
    tmp_path: Path, name: str, state: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_cifar10(str(tmp_path / name))
    assert str(caught.value) == (
        f"[problem] path = {str(tmp_path / name)!r}: {state}: must be the folder of CIFAR-10's files "
        "data_batch_1.bin to data_batch_5.bin and test_batch.bin, or of the same without .bin"
    )
