"""Configuration of the field problem: which field is forecast, from which part of it is learnt, and with which model.

Nothing here imports torch or opens the data, so that a configuration is validated at once. What can only be said
with the file open (does the variable exist, is the window shorter than the training part) is checked by field_data.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pnode_dist.config.tables import ForecastRun

Boundary = Literal["replicate", "periodic", "zero"]
Count = Annotated[int, Field(ge=1, strict=True)]


class FieldConfig(BaseModel):
    """The table `[problem]` with `type = "field"`: a field `[time, y, x]` or `[time, y, x, channel]` that xarray opens.

    Lengths of time are counted in steps of the field's own, nearly regular, time axis: months for monthly means.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["field"] = "field"
    path: str
    """A NetCDF or HDF5 file or a Zarr directory; `package:NAME/FILE` is a file inside an installed Python package."""
    variable: str
    """The variable of that file to forecast; its first dimension is time, then y, x and perhaps channel."""
    engine: str | None = None
    """xarray's engine; by default h5netcdf for files and zarr for directories."""
    units: str | None = None
    """Units to report; by default the variable's `units` attribute."""
    mask: str = "nan"
    """`nan`: cells that are NaN at any time lie outside the domain. `none`: no cell does. Else the name of a variable
    `[y, x]` that is non-zero inside."""
    normalisation: Literal["standard", "none"] = "standard"
    """`standard`: less the mean and over the standard deviation of the training part, for each channel."""
    boundary: tuple[Boundary, Boundary] = ("replicate", "replicate")
    """What lies beyond the edges, for y and for x."""
    period: float | None = Field(default=None, gt=0)
    """The length of the seasonal cycle, in years for dates and in the axis' own units otherwise. By default one year
    for dates and no cycle otherwise."""
    validation: Count
    """How many of the last time steps are set aside for validation: nothing is learnt from them."""
    window: Count
    """How many steps ahead of its start a training window reaches."""
    processes: tuple[Count, Count] | None = None
    """Ranks along y and along x; by default the split with the shortest inner edges."""

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


class FieldModelConfig(BaseModel):
    """The table `[model]` of a field problem: the convolutional right-hand side."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: Count = 16
    """Channels of the hidden layers."""
    dilations: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 1)
    """One hidden convolution for each entry, with that dilation."""
    kernel_size: Count = 3
    """Width of every convolution's stencil, odd."""
    activation: Literal["gelu", "silu", "tanh"] = "silu"
    harmonics: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Harmonics of the seasonal cycle that are fitted to the training part in every cell; by default 2 where there is
    a cycle. 0: the mean of the training part is fitted alone."""

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
