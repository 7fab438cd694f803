"""The forecast file: what xarray finds in it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.common.forecast_stream import Row
from pnode_dist.problems.field.data import open_source, read_field
from pnode_dist.problems.field.forecast_file import ForecastFile
from pnode_dist.problems.field.model import windows
from tests.unit.problems.field.synthetic_fields import NX, NY, TIMES, dataset, field_config, months, values, write

STARTS, LEADS = (23, 24, 25), 2


class Written(NamedTuple):
    """The open file, and the states that were written, `[start, lead, ...]` in the field's units, NaN outside."""

    found: xarray.Dataset
    forecast: torch.Tensor
    truth: torch.Tensor


def written(directory: Path, mesh: Mesh, data: xarray.Dataset) -> Written:
    settings = field_config(write(directory / "f.nc", data))
    source = open_source(settings)
    partition = GridPartition(mesh, source.shape, source.channels)
    field = read_field(settings, source, partition, mesh)
    batch = windows(field, STARTS, LEADS, torch.float64)
    states = {kind: torch.rand(LEADS, len(STARTS), NY, NX, source.channels).double() for kind in ("forecast", "truth")}
    with ForecastFile(directory / "forecast.h5", batch, partition, mesh) as file:
        for kind, values in states.items():
            for lead in (1, 2):
                # The windows come in any order of batches.
                for starts in (range(1, 3), range(1)):
                    file.write(kind, Row(lead, starts, values[lead - 1, list(starts)]))
    outside = field.inside == 0
    given = (
        field.physical(values).masked_fill(outside, torch.nan).float().transpose(0, 1) for values in states.values()
    )
    return Written(xarray.open_dataset(directory / "forecast.h5", engine="h5netcdf"), *given)


def test_a_field_without_channels_has_four_dimensions_and_dates(tmp_path: Path, mesh: Mesh) -> None:
    contents = written(tmp_path, mesh, dataset(values()))
    found = contents.found
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
    contents = written(tmp_path, mesh, dataset(values(channels=2), 0.5 * np.arange(TIMES)))
    found = contents.found
    assert found.forecast.dims == ("start", "lead", "lat", "lon", "level")
    np.testing.assert_array_equal(found.forecast, contents.forecast.numpy())
    np.testing.assert_array_equal(found.start, [11.5, 12.0, 12.5])
    np.testing.assert_array_equal(found.valid_time[0], [12.0, 12.5])


def test_an_older_file_is_replaced(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "forecast.h5").write_bytes(b"something else")
    found = written(tmp_path, mesh, dataset(values())).found
    assert "forecast" in found


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, mesh: Mesh) -> None:
    (tmp_path / "forecast.h5").mkdir()
    with pytest.raises(ConfigurationError, match=r"forecast\.h5: cannot be written"):
        written(tmp_path, mesh, dataset(values()))
