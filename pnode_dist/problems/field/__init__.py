"""Forecasts of a gridded field, such as the sea surface temperature."""

from __future__ import annotations

from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.problems.field.config import FieldRun

PROBLEM = ProblemDefinition(
    FieldRun,
    "pnode_dist.problems.field.problem:build_field",
    "Forecast a gridded field from files: NetCDF, zarr, or a data set of iris-sample-data.",
)
