"""A small configuration with its data, for tests that run whole commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.problems.field.synthetic_fields import config, dataset, values, write


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration that trains in about a second, over a field of 30 months on 6 x 9 points."""
    data = write(tmp_path / "sst.nc", dataset(values()))
    path = tmp_path / "small.toml"
    path.write_text(config(data, run={"name": "small", "directory": str(tmp_path / "run")}).to_toml())
    return path
