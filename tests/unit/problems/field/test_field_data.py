"""Opening fields, their time axes, and reading parts of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.paths import resolve_path
from pnode_dist.problems.field.config import FieldConfig
from pnode_dist.problems.field.data import Field, open_source, read_field
from tests.unit.problems.field.synthetic_fields import (
    NX,
    NY,
    TIMES,
    VALIDATION,
    dataset,
    field_config,
    land,
    months,
    values,
    write,
)

TRAINING = TIMES - VALIDATION


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "sst.nc", dataset(values()))


def read(config: FieldConfig, mesh: Mesh) -> Field:
    source = open_source(config)
    return read_field(config, source, GridPartition(mesh, source.shape, source.channels), mesh)


# Files


def test_a_path_may_name_a_file_inside_a_package() -> None:
    path = resolve_path("package:iris_sample_data/sample_data/ostia_monthly.nc")
    assert path.is_file()
    assert path.parts[-3:] == ("iris_sample_data", "sample_data", "ostia_monthly.nc")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.nc", r"\[problem\] path = 'nowhere.nc': there is no such file or directory"),
        ("package:no_such_package/a.nc", "the Python package no_such_package is not installed"),
        ("package:iris_sample_data/a.nc", "there is no such file or directory"),
    ],
)
def test_a_file_that_is_not_there_is_named(path: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_source(field_config(path))


def test_a_file_that_is_no_data_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a data set")
    with pytest.raises(ConfigurationError, match=r"\[problem\] path = .*xarray cannot open .*notes.txt"):
        open_source(field_config(path))


def test_an_unknown_engine_is_named(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\[problem\] engine = 'grb': xarray cannot open"):
        open_source(field_config(path, engine="grb"))


def test_a_variable_that_is_not_there_is_named_with_those_that_are(path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"\[problem\] variable = 'temp': not in the file sst.nc, which has sst, sea"
    ):
        open_source(field_config(path, variable="temp"))


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("sea", r"'sea': nothing says which of its dimensions \(lat: 6, lon: 9\) is time: write \[problem\] axes"),
        ("five", r"'five': its dimensions .* are more than time, y, x and one level: a, b must have one entry"),
    ],
)
def test_a_variable_of_other_dimensions_is_refused(tmp_path: Path, variable: str, message: str) -> None:
    data = dataset(values()).assign(five=(("time", "lat", "lon", "a", "b"), np.zeros((TIMES, NY, NX, 2, 2))))
    with pytest.raises(ConfigurationError, match=message):
        open_source(field_config(write(tmp_path / "f.nc", data), variable=variable))


def test_plain_hdf5_and_fields_with_channels_are_read_alike(tmp_path: Path, mesh: Mesh) -> None:
    field = values(channels=2)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["sst"] = field
    axes = {"time": "phony_dim_0", "y": "phony_dim_1", "x": "phony_dim_2"}
    plain = read(field_config(tmp_path / "plain.h5", mask="none", axes=axes), mesh)
    named = read(field_config(write(tmp_path / "named.nc", dataset(field, masked=False)), mask="none"), mesh)
    assert plain.channels == named.channels == 2
    assert plain.time.period is None
    assert named.time.period == 1.0
    assert torch.equal(plain.values, named.values)
    np.testing.assert_allclose(plain.physical(plain.values), field, rtol=1e-14)


@pytest.mark.filterwarnings("ignore::Warning")
def test_zarr_is_read_like_netcdf(tmp_path: Path, path: Path, mesh: Mesh) -> None:
    dataset(values()).to_zarr(tmp_path / "sst.zarr")
    assert torch.equal(read(field_config(tmp_path / "sst.zarr"), mesh).values, read(field_config(path), mesh).values)


# Times


def test_dates_are_years_with_a_cycle_of_one_year(path: Path) -> None:
    time = open_source(field_config(path)).time
    assert time.period == 1.0
    assert time.step == pytest.approx(1 / 12, rel=2e-3)
    assert time.values[0] == pytest.approx(1 + 16 / 365.2425, abs=2e-3)
    assert time.step_name == "months"
    assert time.label(1) == "2001-02"


@pytest.mark.parametrize("day", [0, 14, 27])
def test_seasons_are_calendar_months_whatever_the_day_of_the_stamps(tmp_path: Path, day: int) -> None:
    stamps = months() + np.timedelta64(day - 15, "D")
    time = open_source(field_config(write(tmp_path / "f.nc", dataset(values(), stamps)))).time
    np.testing.assert_array_equal(time.seasons, np.arange(TIMES) % 12)


def test_numbers_stay_as_they_are_and_have_a_cycle_only_if_it_is_configured(tmp_path: Path) -> None:
    path = write(tmp_path / "f.nc", dataset(values(), 3.0 + 0.5 * np.arange(TIMES)))
    without = open_source(field_config(path)).time
    assert (without.period, without.step, without.step_name) == (None, 0.5, "steps")
    assert without.label(0) == "3"
    assert not without.phases.any()
    assert not without.seasons.any()
    cyclic = open_source(field_config(path, period=2.0)).time
    np.testing.assert_allclose(cyclic.phases[:5], [0.5, 0.75, 0, 0.25, 0.5])
    np.testing.assert_array_equal(cyclic.seasons[:5], [0, 1, 2, 3, 0])


@pytest.mark.parametrize(
    ("stamps", "message"),
    [
        (
            np.delete(months(TIMES + 1), 7),
            "missing = 'refuse': the file has no 2001-08: missing = 'mask' leaves such times out",
        ),
        (np.arange(TIMES)[::-1], "its time axis time in f.nc must increase: 29 is followed by 28"),
        (
            np.array([f"m{number}" for number in range(TIMES)]),
            "holds values of type <U3: must hold dates or numbers, all known",
        ),
        (
            np.where(np.arange(TIMES) == 4, np.nan, np.arange(TIMES)),
            "has unknown times: must hold dates or numbers, all known",
        ),
    ],
    ids=["a gap", "decreasing", "text", "unknown"],
)
def test_times_that_are_missing_unknown_or_out_of_order_are_refused(tmp_path: Path, stamps: Any, message: str) -> None:
    path = write(tmp_path / "f.nc", dataset(values(), stamps))
    with pytest.raises(ConfigurationError, match=message):
        open_source(field_config(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 60}, r"\[problem\] validation = 60: must be at most 28, as the field has 30 times"),
        ({"window": 24}, r"\[problem\] window = 24: must be at most 23, as 24 times are for training"),
        ({"period": 0.1}, r"\[problem\] period = 0.1: must be two steps"),
        ({"mask": "ice"}, r"\[problem\] mask = 'ice': not in the file"),
        ({"mask": "wide"}, r"\[problem\] mask = 'wide': has the dimensions \(lon: 9, time: 30\): must be lat and lon"),
    ],
)
def test_what_the_file_does_not_allow_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = dataset(values()).assign(wide=(("lon", "time"), np.ones((NX, TIMES))))
    with pytest.raises(ConfigurationError, match=message):
        open_source(field_config(write(tmp_path / "f.nc", data), **changes))


# Parts


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many values of variables with three or more dimensions HDF5 hands out from now on."""
    counts = [0]
    original = h5py.Dataset.__getitem__

    def counted(self: h5py.Dataset, key: Any, *more: Any, **options: Any) -> Any:
        found = original(self, key, *more, **options)
        counts[0] += np.size(found) if self.ndim >= 3 else 0
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    return lambda: counts[0]


def test_a_part_is_the_slice_of_the_whole_and_nothing_else_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_values = count_reads(monkeypatch)
    source = open_source(field_config(path, mask="sea"))
    assert read_values() == 0
    part, inside = source.read(((1, 4), (2, 7)))
    assert read_values() == TIMES * 3 * 5
    expected = np.where(land(), np.nan, values())[:, 1:4, 2:7]
    np.testing.assert_array_equal(part[..., 0], expected)
    assert inside is not None
    np.testing.assert_array_equal(inside, ~land()[1:4, 2:7])


def test_values_are_normalised_by_the_training_part(path: Path, mesh: Mesh) -> None:
    field = read(field_config(path), mesh)
    learnt = values()[:TRAINING][:, ~land()]
    assert field.cells == int((~land()).sum())
    assert field.mean.item() == pytest.approx(learnt.mean(), rel=1e-14)
    assert field.deviation.item() == pytest.approx(learnt.std(), rel=1e-13)
    expected = np.where(land(), 0, (values() - learnt.mean()) / learnt.std())
    np.testing.assert_allclose(field.values[..., 0], expected, atol=1e-11)
    assert (field.training, len(field.time), field.units) == (TRAINING, TIMES, "K")


def test_nothing_learnt_depends_on_the_validation_part(tmp_path: Path, path: Path, mesh: Mesh) -> None:
    other = values()
    other[TRAINING:] *= 1.5
    changed = read(field_config(write(tmp_path / "other.nc", dataset(other))), mesh)
    field = read(field_config(path), mesh)
    assert torch.equal(field.mean, changed.mean)
    assert torch.equal(field.deviation, changed.deviation)
    assert torch.equal(field.climatology(), changed.climatology())
    assert torch.equal(field.values[:TRAINING], changed.values[:TRAINING])
    assert not torch.equal(field.values[TRAINING:], changed.values[TRAINING:])


def test_climatology_is_the_mean_of_the_calendar_month_over_the_training_part(path: Path, mesh: Mesh) -> None:
    field = read(field_config(path), mesh)
    found = field.physical(field.climatology())[..., 0].numpy()
    calendar = [int(str(month)[5:7]) for month in months().astype("datetime64[M]")]
    for index in range(TIMES):
        same = [number for number in range(TRAINING) if calendar[number] == calendar[index]]
        np.testing.assert_allclose(found[index][~land()], values()[same].mean(axis=0)[~land()], rtol=1e-13)


def test_climatology_is_the_training_mean_where_the_seasons_are_not_all_known(path: Path, mesh: Mesh) -> None:
    field = read(field_config(path, validation=20), mesh)
    found = field.physical(field.climatology())[..., 0].numpy()
    expected = np.broadcast_to(values()[:10].mean(axis=0), found.shape)
    np.testing.assert_allclose(found[:, ~land()], expected[:, ~land()], rtol=1e-13)


def test_without_normalisation_values_stay_in_their_units(path: Path, mesh: Mesh) -> None:
    field = read(field_config(path, normalisation="none"), mesh)
    np.testing.assert_array_equal(field.values[..., 0], np.where(land(), 0, values()))


def test_a_mask_may_be_a_variable_or_absent(tmp_path: Path, mesh: Mesh) -> None:
    path = write(tmp_path / "f.nc", dataset(values(), masked=False))
    assert read(field_config(path, mask="sea"), mesh).cells == int((~land()).sum())
    assert read(field_config(path, mask="none"), mesh).cells == NY * NX


def test_values_that_are_not_finite_inside_the_mask_are_counted(path: Path, mesh: Mesh) -> None:
    missing = TIMES * int(land().sum())
    with pytest.raises(ConfigurationError, match=f"mask = 'none': {missing} values of sst inside it are not finite"):
        read(field_config(path, mask="none"), mesh)


def test_a_mask_that_leaves_nothing_is_refused(tmp_path: Path, mesh: Mesh) -> None:
    data = dataset(np.full_like(values(), np.nan))
    with pytest.raises(ConfigurationError, match="mask = 'nan': leaves no cell of sst inside"):
        read(field_config(write(tmp_path / "f.nc", data)), mesh)
