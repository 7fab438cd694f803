"""Configuration of the field problem: which field is forecast, from which part of it is learnt, and with which model.

Nothing here imports torch or opens the data, so that a configuration is validated at once. What can only be said
with the file open (does the variable exist, is the window shorter than the training part) is checked by field_data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from pnode_dist.config.tables import ForecastRun, InverseConfig, Positive, Table

Boundary = Literal["replicate", "periodic", "zero"]
Count = Annotated[int, Field(ge=1, strict=True)]
Index = Annotated[int, Field(ge=0, strict=True)]
Value = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class LevelIndex(Table):
    """The table `[problem] level = { index = ... }`: levels by their position instead of their value."""

    index: Index | Annotated[tuple[Index, ...], Field(min_length=1)]
    """The position of one level, counted from 0, or of several."""


class FieldConfig(Table):
    """The table `[problem]` with `type = "field"`: variables on a grid that xarray opens.

    Lengths of time are counted in steps of the field's own time axis: months for monthly means.
    """

    type: Literal["field"] = "field"
    """The name of the problem."""
    path: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """A NetCDF or HDF5 file or a Zarr directory, a glob of these, or a list of both. Several files are parts of one
    data set along time. `package:NAME/FILE` is a file inside an installed Python package."""
    variable: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """The variable to forecast, or a list of variables on the same grid and times, which become channels."""
    axes: dict[str, str] = Field(default_factory=dict)
    """The names of dimensions, or of their coordinates, whose attributes do not tell which axis they are:
    `{ time = "t", y = "j", x = "i" }`."""
    level: Value | str | Annotated[tuple[Value | str, ...], Field(min_length=1)] | LevelIndex = "all"
    """`all`: every level is a channel. A value of the level's coordinate: that level alone. A list of values: these
    levels as channels. `{ index = 3 }` and `{ index = [0, 3] }`: the same by position. The nearest is never taken."""
    missing: Literal["refuse", "mask"] = "refuse"
    """Times that are missing, as gaps in the time axis or without a single value. `refuse`: an error that names them.
    `mask`: they, and single values that are missing at some times, count neither in the loss nor in the figures; no
    window and no forecast starts at a time that lacks values."""
    engine: str | None = None
    """The engine by which xarray opens the files. Default: h5netcdf for files, zarr for directories."""
    units: str | tuple[str, ...] | None = None
    """Units to report, one for each variable; by default the variables' `units` attributes."""
    mask: str = "nan"
    """`nan`: cells that are NaN at any time lie outside the domain, and with `missing = "mask"` those that are NaN at
    all training times. `none`: no cell does. Else the name of a variable `[y, x]` that is non-zero inside."""
    normalisation: Literal["standard", "none"] = "standard"
    """`standard` subtracts the mean of the training data and divides by their standard deviation, for each channel."""
    boundary: tuple[Boundary, Boundary] = ("replicate", "replicate")
    """The values beyond the edges of the field, along y and along x. `periodic` is refused where longitudes do not go
    round the globe once, and for latitudes."""
    period: float | None = Field(default=None, gt=0)
    """The length of the seasonal cycle, in years if times are dates, otherwise in the units of the time axis. Default:
    one year for dates half a year apart or less, otherwise no cycle."""
    validation: Count
    """The number of last time steps that are held out for validation."""
    window: Count
    """Length of a training window, in time steps after its start."""
    processes: tuple[Count, Count] | None = None
    """Ranks along y and along x. Default: the split with the shortest inner edges."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The configured files and globs."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def variables(self) -> tuple[str, ...]:
        """The configured variables."""
        return (self.variable,) if isinstance(self.variable, str) else self.variable

    @field_validator("path", "variable", "mask", "axes")
    @classmethod
    def _not_empty(cls, value: str | tuple[str, ...] | dict[str, str]) -> str | tuple[str, ...] | dict[str, str]:
        entries = (value,) if isinstance(value, str) else value.values() if isinstance(value, dict) else value
        if not all(entry.strip() for entry in entries):
            raise ValueError("must not be empty")
        return value

    @field_validator("axes")
    @classmethod
    def _known_axes(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value) - {"time", "y", "x", "level"})
        if unknown:
            raise ValueError(f"must have the keys time, y, x or level, not {unknown[0]}")
        return value

    @field_validator("path")
    @classmethod
    def _package_and_file(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for entry in (value,) if isinstance(value, str) else value:
            if entry.startswith("package:"):
                package, _, inside = entry.removeprefix("package:").partition("/")
                if not package.isidentifier() or not inside:
                    raise ValueError("must be package:NAME/FILE, a file inside an installed Python package")
        return value

    @field_validator("variable")
    @classmethod
    def _different(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str) and len(set(value)) < len(value):
            raise ValueError("must name no variable twice")
        return value

    @field_validator("units")
    @classmethod
    def _one_for_each(cls, value: str | tuple[str, ...] | None, others: ValidationInfo) -> str | tuple[str, ...] | None:
        variable = others.data.get("variable", "")
        variables = 1 if isinstance(variable, str) else len(variable)
        units = 1 if isinstance(value, str) else len(value or ())
        if value is not None and units != variables:
            raise ValueError(f"must have one entry for each variable, {variables}")
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


class FieldInverseConfig(InverseConfig):
    """The table `[inverse]` of a field problem: the initial state of a window of the validation part.

    The window begins `start` samples after the beginning of the validation part. Its first `observed` samples are
    observed, and `forecast` more are compared with the truth. Observations are the field's own values at every
    `every`-th cell along both axes, with independent errors drawn from the run's seed. Cells outside the mask and
    missing values are not observed. The equations are the model. The first guess is its seasonal cycle, fitted to the
    training part, which is also the mean of the prior. The prior does not correlate cells across land.
    """

    start: Index = 0
    """Samples of the validation part before the window."""
    every: Annotated[int, Field(ge=2, strict=True)] = 6
    """Cells from one observed cell to the next, along both axes."""
    observed: Count = 3
    """Samples that are observed: the first one of the window, and those that follow it."""
    forecast: Count = 3
    """Samples after the last observed one that are forecast and compared."""
    noise: Positive = 0.3
    """Standard deviation of the errors of the observations, in the units of `evaluate`'s errors."""
    deviation: Positive = 1.0
    """Standard deviation of the prior far from coasts, in the units of `evaluate`'s errors."""
    length: tuple[Positive, Positive] = (5.0, 10.0)
    """Correlation lengths of the prior along y and along x, in cells."""
    trained: Annotated[str, Field(min_length=1)] | None = None
    """The run directory whose trained parameters the model takes. Default: the parameters before training, with which
    departures from the seasonal cycle are damped."""


class FieldRun(ForecastRun):
    """A whole configuration of a field problem."""

    problem: FieldConfig
    model: FieldModelConfig = FieldModelConfig()
    inverse: FieldInverseConfig = FieldInverseConfig()
