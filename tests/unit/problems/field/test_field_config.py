"""What the tables [problem] and [model] of a field problem refuse before any file is opened."""

import re
import tomllib
from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.config import FieldConfig

BASE = """
[problem]
path = "sst.nc"
variable = "sst"
validation = 12
window = 6
[training]
epochs = 1
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "problem.path=package:iris-sample-data",
            "must be package:NAME/FILE, a file inside an installed Python package",
        ),
        ("problem.variable=' '", "must not be empty"),
        ('problem.boundary=["replicate", "open"]', "'replicate', 'periodic' or 'zero'|replicate.*periodic.*zero"),
        ("problem.validation=0", "validation = 0"),
        ("problem.window=2.5", "window = 2.5"),
        ("problem.period=-1", "period = -1"),
        ("problem.path=[]", "must be a string or a list of at least 1 entry"),
        ('problem.variable=["sst", "sst"]', "must name no variable twice"),
        ('problem.units=["K", "Pa"]', "must have one entry for each variable, 1"),
        ('problem.axes={t="time"}', "must have the keys time, y, x or level, not t"),
        ("problem.axes={time=''}", "must not be empty"),
        ("problem.level={index=-1}", "level = "),
        ("problem.missing=drop", "must be one of refuse, mask"),
        ("problem.varaible=sst", "unknown key varaible"),
        ("model.kernel_size=4", "must be odd, so that the field keeps its size"),
        ("model.dilations=[]", "dilations"),
        ("model.activation=relu", "gelu.*silu.*tanh"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load(path, [override])
    assert "\n" not in str(caught.value)


def test_the_shipped_configuration_is_valid() -> None:
    shipped = load(Path(__file__).parents[4] / "launch" / "configs" / "sea_surface.toml")
    assert shipped.problem.validation == 12
    assert shipped.evaluation.leads == (1, 2, 3, 4, 5, 6)


def test_the_table_in_the_guide_is_valid() -> None:
    guide = (Path(__file__).parents[4] / "docs/guides/gridded_data.md").read_text()
    block = next(text for text in re.findall(r"```toml\n(.*?)```", guide, re.DOTALL) if "tas_*.nc" in text)
    table = FieldConfig.model_validate(tomllib.loads(block)["problem"])
    assert table.variables == ("tas", "ps")
    assert table.level == 500
