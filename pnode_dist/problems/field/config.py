"""Configuration of the field problem: which field is forecast, from which part of it is learnt, and with which model.

Nothing here imports torch or opens the data, so that a configuration is validated at once. What can only be said
with the file open (does the variable exist, is the window shorter than the training part) is checked by field_data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pnode_dist.config.tables import ForecastRun, Table

Boundary = Literal["replicate", "periodic", "zero"]
Count = Annotated[int, Field(ge=1, strict=True)]


class FieldConfig(Table):
    """The table `[problem]` with `type = "field"`: a field `[time, y, x]` or `[time, y, x, channel]` that xarray opens.

    Lengths of time are counted in steps of the field's own, nearly regular, time axis: months for monthly means.
    """

    type: Literal["field"] = "field"
    """The name of the problem."""
    path: str
    """A NetCDF or HDF5 file or a Zarr directory. `package:NAME/FILE` is a file inside an installed Python package."""
    variable: str
    """The variable to forecast, with the dimensions time, y, x and optionally channel, in this order."""
    engine: str | None = None
    """The engine by which xarray opens the file. Default: h5netcdf for files, zarr for directories."""
    units: str | None = None
    """The units of reported errors. Default: the attribute `units` of the variable."""
    mask: str = "nan"
    """The cells outside the domain. `nan`: cells that are NaN at any time. `none`: no cells. Otherwise the name of a
    variable `[y, x]` that is zero outside the domain."""
    normalisation: Literal["standard", "none"] = "standard"
    """`standard` subtracts the mean of the training data and divides by their standard deviation, for each channel."""
    boundary: tuple[Boundary, Boundary] = ("replicate", "replicate")
    """The values beyond the edges of the field, along y and along x."""
    period: float | None = Field(default=None, gt=0)
    """The length of the seasonal cycle, in years if times are dates, otherwise in the units of the time axis. Default:
    one year if times are dates, otherwise no cycle."""
    validation: Count
    """The number of last time steps that are held out for validation."""
    window: Count
    """Length of a training window, in time steps after its start."""
    processes: tuple[Count, Count] | None = None
    """Ranks along y and along x. Default: the split with the shortest inner edges."""

    @field_validator("path", "variable", "mask")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return value

    @field_validator("path")
    @classmethod
    def _package_and_file(cls, value: str) -> str:
        if value.startswith("package:"):
            package, _, inside = value.removeprefix("package:").partition("/")
            if not package.isidentifier() or not inside:
                raise ValueError("must be package:NAME/FILE, a file inside an installed Python package")
        return value


class FieldModelConfig(Table):
    """The table `[model]` of a field problem: the convolutional right-hand side."""

    channels: Count = 16
    """Channels of each hidden layer."""
    dilations: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 1)
    """The dilation of each hidden convolution."""
    kernel_size: Count = 3
    """Width of the stencil of each convolution, in cells. Must be odd."""
    activation: Literal["gelu", "silu", "tanh"] = "silu"
    """The activation function between layers."""
    harmonics: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Harmonics of the seasonal cycle to fit to the training data in each cell. 0 fits the mean only. Default: 2 if
    there is a cycle."""

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the field keeps its size")
        return value


class FieldRun(ForecastRun):
    """A whole configuration of a field problem."""

    problem: FieldConfig
    model: FieldModelConfig = FieldModelConfig()
