"""One small field in many files: orders, calendars, packings, levels, globs. Each maker says how to read it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cftime
import h5py
import numpy as np
import numpy.typing as npt
import pytest
import xarray

Array = npt.NDArray[Any]
T, NY, NX = 7, 4, 6
LAT, LON = np.linspace(-45.0, 45.0, NY), np.arange(NX) * 60.0


def plain() -> Array:
    """The field `[time, y, x]`, in multiples of 1/8 that float32 and packed numbers hold exactly."""
    numbers = np.random.default_rng(1).integers(-200, 200, size=(T, NY, NX))
    return np.asarray(280.0 + numbers / 8)


def dates(calendar: str = "noleap", first: int = 2001) -> Array:
    """The 16th of each month from January on."""
    return np.array([cftime.datetime(first + n // 12, n % 12 + 1, 16, calendar=calendar) for n in range(T)])


def months() -> Array:
    """The same dates as datetime64."""
    return np.array([f"2001-{number + 1:02d}-16" for number in range(T)], dtype="datetime64[ns]")


def dataset(values: Array | None = None, time: Any = None, **attributes: Any) -> xarray.Dataset:
    """The field as people's files have it."""
    return xarray.Dataset(
        {"tas": (("time", "lat", "lon"), plain() if values is None else values, {"units": "K", **attributes})},
        coords={
            "time": months() if time is None else time,
            "lat": ("lat", LAT, {"units": "degrees_north", "standard_name": "latitude"}),
            "lon": ("lon", LON, {"units": "degrees_east", "standard_name": "longitude"}),
        },
    )


@dataclass(frozen=True)
class Case:
    """What was written, how it is configured, and what is to be read from it."""

    path: Any
    keys: dict[str, Any] = field(default_factory=dict)
    expected: Array | None = None
    stamps: Array | None = None
    lat: Array | None = field(default_factory=lambda: LAT)
    lon: Array | None = field(default_factory=lambda: LON)


def save(path: Path, data: xarray.Dataset, **options: Any) -> str:
    """Write NetCDF-4, or what `options` say."""
    data.to_netcdf(path, engine=options.pop("engine", "h5netcdf"), **options)
    return str(path)


def _order(*names: str) -> Callable[[Path], Case]:
    return lambda place: Case(save(place / "a.nc", dataset().transpose(*names)))


def _calendar(name: str) -> Callable[[Path], Case]:
    def make(place: Path) -> Case:
        return Case(save(place / "a.nc", dataset(time=dates(name))), stamps=dates(name))

    return make


def _descending(place: Path) -> Case:
    data = dataset().isel(lat=slice(None, None, -1))
    return Case(save(place / "a.nc", data), expected=plain()[:, ::-1], lat=LAT[::-1])


def _big_endian(place: Path) -> Case:
    with h5py.File(place / "a.nc", "w") as file:
        for name, values in (("lat", LAT), ("lon", LON), ("time", np.arange(T) * 30)):
            file.create_dataset(name, data=values.astype(">f4" if name != "time" else ">i4")).make_scale(name)
        file["lat"].attrs["units"], file["lon"].attrs["units"] = "degrees_north", "degrees_east"
        file["time"].attrs.update({"units": "days since 2001-01-16", "calendar": "360_day"})
        stored = file.create_dataset("tas", data=plain().astype(">f4"))
        stored.attrs["units"] = "K"
        for axis, name in enumerate(("time", "lat", "lon")):
            stored.dims[axis].attach_scale(file[name])
    return Case(str(place / "a.nc"), stamps=dates("360_day"))


def _packed(place: Path) -> Case:
    values = plain()
    values[:, 1, 2] = np.nan
    packing = {"dtype": "int16", "scale_factor": 0.125, "add_offset": 280.0, "_FillValue": -32768}
    return Case(save(place / "a.nc", dataset(values), encoding={"tas": packing}), expected=values)


def _zarr(version: int) -> Callable[[Path], Case]:
    def make(place: Path) -> Case:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset().to_zarr(place / "a.zarr", zarr_format=version)
        return Case(str(place / "a.zarr"))

    return make


def _glob(place: Path) -> Case:
    for name, part in (("m_c.nc", slice(0, 2)), ("m_a.nc", slice(2, 5)), ("m_b.nc", slice(5, None))):
        # The parts may differ in the order of their dimensions and in how their times are encoded.
        piece = dataset().isel(time=part)
        save(place / name, piece if part.start else piece.transpose("lat", "lon", "time"))
    return Case(str(place / "m_*.nc"))


def _one_time_a_file(place: Path) -> Case:
    return Case([save(place / f"{number}.nc", dataset().isel(time=number)) for number in range(T)])


def _unlike(place: Path) -> Case:
    data = dataset().rename_dims(time="t", lat="j", lon="i").reset_index(["time", "lat", "lon"])
    data = data.reset_coords(drop=False).set_coords(["time", "lat", "lon"])
    return Case(save(place / "a.nc", data.transpose("i", "j", "t")))


def _named(place: Path) -> Case:
    data = xarray.Dataset({"tas": (("a", "b", "c"), plain().transpose(1, 0, 2), {"units": "K"})})
    keys = {"axes": {"time": "b", "y": "a", "x": "c"}}
    return Case(save(place / "a.nc", data), keys, stamps=np.arange(float(T)), lat=np.arange(NY), lon=np.arange(NX))


def _levels() -> xarray.Dataset:
    data = xarray.concat([dataset() + 100 * number for number in range(3)], "plev").assign_coords(
        plev=("plev", np.array([850.0, 500.0, 0.1], dtype=np.float32), {"units": "hPa", "positive": "down"})
    )
    data.tas.attrs["units"] = "K"
    return data.transpose("time", "plev", "lat", "lon")


def _level(choice: Any, *chosen: int) -> Callable[[Path], Case]:
    def make(place: Path) -> Case:
        values = np.stack([plain() + 100 * number for number in chosen], axis=-1)
        return Case(save(place / "a.nc", _levels()), {"level": choice}, expected=values)

    return make


def _one_level(place: Path) -> Case:
    return Case(save(place / "a.nc", _levels().isel(plev=[0]).transpose("lat", "plev", "time", "lon")))


def _two_variables(place: Path) -> Case:
    data = _levels()
    data["ps"] = (("lon", "time", "lat"), plain().transpose(2, 0, 1) * 2, {"units": "Pa"})
    expected = np.stack([plain() * 2, plain() + 100], axis=-1)
    return Case(save(place / "a.nc", data), {"variable": ["ps", "tas"], "level": 500}, expected=expected)


def _curvilinear(place: Path) -> Case:
    y, x = np.meshgrid(LAT, LON, indexing="ij")
    data = xarray.Dataset(
        {"tas": (("time", "x", "y"), plain().swapaxes(1, 2), {"units": "K"})},
        coords={
            "time": months(),
            "nav_lat": (("y", "x"), y + 0.1 * x / 60, {"standard_name": "latitude", "units": "degrees_north"}),
            "nav_lon": (("y", "x"), x, {"standard_name": "longitude", "units": "degrees_east"}),
        },
    )
    return Case(save(place / "a.nc", data), lat=np.arange(NY), lon=np.arange(NX))


def _beside(place: Path) -> Case:
    data = dataset(time=dates()).assign_coords(height=2.0, forecast_period=("time", np.arange(T)))
    data.forecast_period.attrs["units"] = "hours"
    data["time_bnds"] = (("time", "bnds"), np.stack([dates(), dates()], axis=-1))
    data.time.attrs["bounds"] = "time_bnds"
    data.time.encoding["units"] = "days since 2001-01-01"
    return Case(save(place / "a.nc", data), stamps=dates())


def _irregular(place: Path) -> Case:
    stamps = months() + np.array([0, 3, 40, 41, 99, 100, 180], dtype="timedelta64[D]")
    return Case(save(place / "a.nc", dataset(time=stamps)), stamps=stamps)


def _numbers(place: Path) -> Case:
    return Case(save(place / "a.nc", dataset(time=3 * np.arange(T))), stamps=3 * np.arange(T))


def _wrapping(place: Path) -> Case:
    lon = (LON + 200) % 360
    data = dataset().assign_coords(lon=("lon", lon, dataset().lon.attrs))
    return Case(save(place / "a.nc", data), {"boundary": ("replicate", "periodic")}, lon=lon)


def _valid_range(place: Path) -> Case:
    low, high = np.percentile(plain(), [10, 90])
    expected = np.where((plain() < low) | (plain() > high), np.nan, plain())
    return Case(save(place / "a.nc", dataset(valid_range=np.array([low, high]))), expected=expected)


def _nemo(place: Path) -> Case:
    """A time axis that counts, and the dates beside it."""
    data = dataset().rename_dims(time="time_counter").reset_index("time").reset_coords().rename(time="time_centered")
    data = data.set_coords(["time_centered", "lat", "lon"]).assign_coords(
        time_counter=("time_counter", np.arange(T, dtype=float), {"axis": "T"})
    )
    data.time_centered.attrs["standard_name"] = "time"
    return Case(save(place / "a.nc", data))


CASES: dict[str, Callable[[Path], Case]] = {
    "time, y, x": _order("time", "lat", "lon"),
    "y, x, time": _order("lat", "lon", "time"),
    "x, time, y": _order("lon", "time", "lat"),
    "descending latitudes": _descending,
    **{name: _calendar(name) for name in ("noleap", "360_day", "julian", "all_leap")},
    "float32, big-endian": _big_endian,
    "packed": _packed,
    "NetCDF-3": lambda place: Case(save(place / "a.nc", dataset(), engine="scipy", format="NETCDF3_64BIT")),
    "zarr 2": _zarr(2),
    "zarr 3": _zarr(3),
    "glob": _glob,
    "one time a file": _one_time_a_file,
    "dimensions unlike coordinates": _unlike,
    "dimensions named": _named,
    "level by value": _level(500, 1),
    "level by a value that float32 rounds": _level(0.1, 2),
    "level by index": _level({"index": 2}, 2),
    "levels by value": _level([500, 850], 1, 0),
    "all levels": _level("all", 0, 1, 2),
    "one level": _one_level,
    "two variables, one with levels": _two_variables,
    "curvilinear": _curvilinear,
    "bounds and scalars beside it": _beside,
    "irregular times": _irregular,
    "times are numbers": _numbers,
    "longitudes that wrap": _wrapping,
    "valid_range": _valid_range,
    "dates beside a counter": _nemo,
}


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
