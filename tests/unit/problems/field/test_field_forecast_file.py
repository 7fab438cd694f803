"""The forecast file: what xarray finds in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.data import open_source, read_field
from pnode_dist.problems.field.forecast_file import Forecast, write_forecast
from tests.unit.problems.field.synthetic_fields import NX, NY, TIMES, dataset, field_config, months, values, write

STARTS, LEADS = (23, 24, 25), 2


def written(directory: Path, mesh: Mesh, data: xarray.Dataset) -> tuple[xarray.Dataset, Forecast]:
    settings = field_config(write(directory / "f.nc", data))
    source = open_source(settings)
    partition = GridPartition(mesh, source.shape, source.channels)
    shape = (len(STARTS), LEADS, NY, NX, source.channels)
    contents = Forecast(read_field(settings, source, partition, mesh), STARTS, torch.rand(shape), torch.rand(shape))
    write_forecast(directory / "forecast.h5", contents, partition, mesh)
    return xarray.open_dataset(directory / "forecast.h5", engine="h5netcdf"), contents


def test_a_field_without_channels_has_four_dimensions_and_dates(tmp_path: Path, mesh: Mesh) -> None:
    found, contents = written(tmp_path, mesh, dataset(values()))
    assert dict(found.sizes) == {"start": 3, "lead": 2, "lat": NY, "lon": NX}
    for name, expected in (("forecast", contents.forecast), ("truth", contents.truth)):
        assert found[name].attrs["units"] == "K"
        np.testing.assert_array_equal(found[name], expected[..., 0].numpy())
    np.testing.assert_array_equal(found.lead, [1, 2])
    np.testing.assert_array_equal(found.start, months()[list(STARTS)])
    np.testing.assert_array_equal(found.valid_time, months()[np.add.outer(STARTS, [1, 2])])
    np.testing.assert_array_equal(found.lat, np.linspace(-5, 5, NY))
    assert found.lon.attrs["units"] == "degrees_east"


def test_a_field_with_channels_and_numbers_for_times_has_five_dimensions(tmp_path: Path, mesh: Mesh) -> None:
    found, contents = written(tmp_path, mesh, dataset(values(channels=2), 0.5 * np.arange(TIMES)))
    assert found.forecast.dims == ("start", "lead", "lat", "lon", "level")
    np.testing.assert_array_equal(found.forecast, contents.forecast.numpy())
    np.testing.assert_array_equal(found.start, [11.5, 12.0, 12.5])
    np.testing.assert_array_equal(found.valid_time[0], [12.0, 12.5])


def test_an_older_file_is_replaced(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "forecast.h5").write_bytes(b"something else")
    found, _ = written(tmp_path, mesh, dataset(values()))
    assert "forecast" in found


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "forecast.h5").mkdir()
    with pytest.raises(ConfigurationError, match=r"forecast\.h5: cannot be written"):
        written(tmp_path, mesh, dataset(values()))
