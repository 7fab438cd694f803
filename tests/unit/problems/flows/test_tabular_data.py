"""Tables: MAF's files as its published code prepares them, what is wrong with others, and scikit-learn's tables."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sklearn import datasets

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.flows.config import EMBEDDED, FILES
from pnode_dist.problems.flows.tables import embedded, published

ROWS = 57


def table(columns: int, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return 3.0 + 2.0 * np.random.default_rng(seed).normal(size=(rows, columns))


def stored(directory: Path, name: str, rows: Any) -> Path:
    path = directory / FILES[name]
    path.parent.mkdir()
    if name == "bsds300":
        with h5py.File(path, "w") as file:
            for part, values in rows.items():
                file[part] = values
    else:
        np.save(path, rows)
    return path


# MAF's files


def test_power_is_shuffled_filled_split_and_scaled_as_maf_does(tmp_path: Path) -> None:
    rows = table(8)
    stored(tmp_path, "power", rows)
    found = published("power", str(tmp_path))
    # The steps of MAF's datasets/power.py, one after another.
    rng = np.random.RandomState(42)
    rng.shuffle(rows)
    data = rows[:, [0, 2, 4, 5, 6, 7]].copy()
    data[:, 1:2] += 0.01 * rng.rand(ROWS, 1)
    data[:, 0:1] += 0.001 * rng.rand(ROWS, 1)
    data[:, 2:5] += rng.rand(ROWS, 3)
    known, test = data[:-5], data[-5:]
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    np.testing.assert_allclose(found.test, (test - mean) / deviation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.validation, (known[-5:] - mean) / deviation, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.training, (known[:-5] - mean) / deviation, rtol=1e-5, atol=1e-6)
    assert {part.dtype for part in found} == {np.dtype(np.float32)}


def test_miniboone_is_split_in_its_order_and_scaled(tmp_path: Path) -> None:
    rows = table(43)
    stored(tmp_path, "miniboone", rows)
    found = published("miniboone", str(tmp_path))
    assert [len(part) for part in found] == [47, 5, 5]
    known = rows[:52]
    scaled = (rows - known.mean(axis=0)) / known.std(axis=0)
    np.testing.assert_allclose(np.concatenate(found), scaled, rtol=1e-5, atol=1e-6)


def test_bsds300_is_taken_as_it_is(tmp_path: Path) -> None:
    parts = {name: table(63, 20 + number, number) for number, name in enumerate(("train", "validation", "test"))}
    stored(tmp_path, "bsds300", parts)
    for part, expected in zip(published("bsds300", str(tmp_path)), parts.values(), strict=True):
        np.testing.assert_array_equal(part, expected.astype(np.float32))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_line_that_says_what_the_folder_must_hold(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        published(name, str(tmp_path))
    assert str(caught.value) == (
        f"[problem] directory = {str(tmp_path)!r}: must be the folder that holds {FILES[name]}, as published with MAF: "
        f"there is no file {tmp_path / FILES[name]}"
    )


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replaced(rows: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, rows)


def nothing_but_one_group(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["train"] = table(63)


def with_one_nan(rows: np.ndarray) -> np.ndarray:
    rows[3, 2] = np.nan
    return rows


def with_a_constant(rows: np.ndarray) -> np.ndarray:
    rows[:, 7] = 1.0
    return rows


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("power", truncated, "cannot be read as an array of numpy: "),
        ("power", lambda path: path.write_bytes(b""), "cannot be read as an array of numpy: "),
        ("power", replaced(table(9)), "holds an array of shape (57, 9): must have 8 columns and at least 20 rows"),
        (
            "miniboone",
            replaced(table(43, 12)),
            "holds an array of shape (12, 43): must have 43 columns and at least 20",
        ),
        ("miniboone", replaced(np.array([{}, []], object)), "cannot be read as an array of numpy: Object arrays"),
        ("miniboone", replaced(with_one_nan(table(43))), "holds entries that are not finite numbers"),
        ("bsds300", truncated, "cannot be read as the tables of BSDS300: "),
        ("bsds300", nothing_but_one_group, "cannot be read as the tables of BSDS300: "),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    whole = {part: table(63) for part in ("train", "validation", "test")} if name == "bsds300" else table(8)
    path = stored(tmp_path, name, whole)
    damage(path)
    with pytest.raises(ConfigurationError) as caught:
        published(name, str(tmp_path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_constant_column_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, "miniboone", with_a_constant(table(43)))
    with pytest.raises(ConfigurationError, match="column 7 is constant"):
        published("miniboone", str(tmp_path))


# scikit-learn's tables


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_table_is_split_once_and_scaled_by_the_rows_to_learn_from(name: str) -> None:
    found = embedded(name, 0)
    whole = getattr(datasets, f"load_{name}")()["data"]
    assert sum(map(len, found)) == len(whole)
    assert len(found.test) == len(whole) // 5
    assert len(found.validation) == len(whole) // 10
    np.testing.assert_allclose(found.training.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found.training.std(axis=0), 1, rtol=1e-12)
    rows = np.concatenate(found)
    assert all(len(np.unique(column)) == len(rows) for column in rows.T)
    correlations = np.corrcoef(rows.T) - np.eye(rows.shape[1])
    assert np.abs(correlations).max() < 0.985


def test_columns_without_a_density_and_copies_of_others_are_left_out() -> None:
    # The sex of a patient has two values, and one column is mostly 2, 3, 4 or 5, the rest to two decimals; the radius
    # of a cell gives its perimeter and area.
    assert embedded("diabetes", 0).test.shape[1] == 8
    assert embedded("breast_cancer", 0).test.shape[1] < 30
    assert embedded("wine", 0).test.shape[1] == 13
    assert embedded("iris", 0).test.shape[1] == 4


def test_values_move_by_less_than_the_step_of_their_column() -> None:
    found = np.concatenate(embedded("iris", 0))
    original = datasets.load_iris()["data"]
    for column, values in zip(found.T, original.T, strict=True):
        ordered = np.sort(values)
        # Scaled by a map that keeps the order, which is that of the original up to ties.
        slope, offset = np.polyfit(np.sort(column), ordered, 1)
        moved = np.sort(column) * slope + offset
        assert np.abs(moved - ordered).max() < 0.15


def test_the_seed_chooses_the_split() -> None:
    first, again, other = (embedded("wine", seed) for seed in (0, 0, 1))
    assert np.array_equal(first.test, again.test)
    assert not np.array_equal(first.test, other.test)


def test_without_scikit_learn_the_table_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"^\[problem\] density = 'wine': .* scikit-learn, which is missing"):
        embedded("wine", 0)
