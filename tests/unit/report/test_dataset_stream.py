"""A file that is written piece by piece: its content, and what is left of it after an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.report.dataset_file import Later, Variable, write_dataset
from pnode_dist.report.dataset_stream import DatasetStream

VALUES = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5, 1).double()


def variables(mesh: Mesh, values: Any) -> dict[str, Variable]:
    partition = GridPartition(mesh, (4, 5), 1)
    return {
        "u": Variable(("start", "lead", "y", "x", "channel"), values, {"units": "K"}, np.float64, partition),
        "steps": Variable(("lead",), np.arange(3)),
    }


def content(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {name: (data[()].tolist(), str(data.dtype), dict(data.attrs).keys()) for name, data in file.items()}


def test_pieces_in_any_order_make_the_file_that_is_written_at_once(mesh: Mesh, tmp_path: Path) -> None:
    write_dataset(tmp_path / "whole.h5", variables(mesh, VALUES), mesh)
    with DatasetStream(tmp_path / "pieces.h5", variables(mesh, Later(tuple(VALUES.shape))), mesh) as stream:
        for lead in (2, 0, 1):
            stream.write("u", (slice(1, 2), lead), VALUES[1:2, lead])
            stream.write("u", (0, lead), VALUES[0, lead])
        assert not (tmp_path / "pieces.h5").exists()
    assert content(tmp_path / "pieces.h5") == content(tmp_path / "whole.h5")
    assert len(list(tmp_path.iterdir())) == 2


def test_values_that_are_never_written_are_missing(mesh: Mesh, tmp_path: Path) -> None:
    given = {**variables(mesh, Later(tuple(VALUES.shape))), "late": Variable(("lead",), Later((3,)), dtype="f8")}
    with DatasetStream(tmp_path / "f.h5", given, mesh) as stream:
        stream.write("u", (1, 2), VALUES[1, 2])
        stream.write("late", (slice(0, 2),), [4, 5])
    with h5py.File(tmp_path / "f.h5") as file:
        assert np.isnan(file["u"][()]).sum() == VALUES.numel() - 20
        assert np.array_equal(file["late"][:], [4, 5, np.nan], equal_nan=True)


def test_an_older_file_is_left_alone_after_an_error(mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    path.write_bytes(b"older")
    with pytest.raises(ArithmeticError), DatasetStream(path, variables(mesh, Later(tuple(VALUES.shape))), mesh):
        raise ArithmeticError
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_created_is_named_at_once(mesh: Mesh, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "f.h5"):
        with pytest.raises(ConfigurationError, match=rf"^{path}: cannot be written: "):
            DatasetStream(path, variables(mesh, VALUES), mesh)


def test_a_piece_that_cannot_be_written_is_reported_at_the_end(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "f.h5"
    stream = DatasetStream(path, variables(mesh, Later(tuple(VALUES.shape))), mesh)
    with monkeypatch.context() as patched:
        patched.setattr(h5py.Dataset, "__setitem__", full)
        stream.write("u", (0, 0), VALUES[0, 0])
    # The computation goes on, on all ranks.
    stream.write("u", (0, 1), VALUES[0, 1])
    with pytest.raises(ConfigurationError, match=rf"^{path}: cannot be written: No space left on device$"):
        stream.close()
    assert list(tmp_path.iterdir()) == []
