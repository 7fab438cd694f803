"""What the tables [problem] and [model] of a Gray-Scott problem refuse, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.config import FieldRun
from pnode_dist.problems.gray_scott.config import GrayScottRun
from tests.conftest import ROOT

SHORTEST = """
[problem]
type = "gray_scott"
shape = [8, 8]
trajectories = 1
validation = 1
times = 5
interval = 2
window = 4
[training]
epochs = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(SHORTEST)
    return path


WRONG = {
    "problem.type=graph": '[problem] type = "graph": unknown problem: must be one of burgers, field,',
    "problem.type=3": "[problem] type = 3: must be a string",
    'problem.type=["gray_scott"]': '[problem] type = ["gray_scott"]: must be a string',
    "problem.shape=[8]": "[problem] shape = [8]: must be a list of 2 entries, each an integer of at least 3",
    "problem.shape=[8, 2]": "[problem] shape[1] = 2: must be an integer of at least 3",
    "problem.domain=[1.0, 0.0]": "[problem] domain[1] = 0.0: must be a number greater than 0",
    "problem.diffusion=[-1e-5, 0]": "[problem] diffusion[0] = -1e-05: must be a number of at least 0",
    "problem.feed=nan": "[problem] feed = NaN: must be a number of at least 0",
    "problem.kill=high": '[problem] kill = "high": must be a number of at least 0',
    "problem.seed=-1": "[problem] seed = -1: must be an integer of at least 0",
    "problem.times=1": "[problem] times = 1: must be an integer of at least 2",
    "problem.interval=0": "[problem] interval = 0: must be a number greater than 0",
    "problem.window=5": "[problem] window = 5: must be at most 4, one less than times",
    "problem.validation=0": "[problem] validation = 0: must be an integer of at least 1",
    "problem.trajectores=2": "[problem] unknown key trajectores (did you mean trajectories?): must be one of type,",
    "problem.path=sst.nc": "[problem] unknown key path: must be one of type, seed, trajectories",
    "model.layers=1": "[model] layers = 1: must be an integer of at least 2",
    "model.activation=relu": '[model] activation = "relu": must be one of gelu, silu, tanh',
    "model.harmonics=2": "[model] unknown key harmonics: must be one of channels, layers, activation",
    "training.epochs=0": "[training] epochs = 0: must be an integer of at least 1",
    "evaluaton.leads=[1]": "unknown table [evaluaton] (did you mean [evaluation]?)",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_is_allowed(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, [override])
    line = str(caught.value)
    assert line.startswith(f"--set {override}: {WRONG[override]}")
    assert "\n" not in line


def test_what_is_missing_is_named(path: Path) -> None:
    path.write_text(SHORTEST.replace("shape = [8, 8]\n", "").replace("times = 5\n", ""))
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value) == (f"{path}: [problem] times is missing: must be an integer of at least 2 (and 1 more)")


def test_a_wrong_type_in_the_file_is_reported_with_the_file(path: Path) -> None:
    path.write_text(SHORTEST.replace("gray_scott", "grey_scott"))
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value).startswith(
        f'{path}: [problem] type = "grey_scott": unknown problem (did you mean gray_scott?)'
    )


def test_the_type_of_the_problem_chooses_its_tables(path: Path) -> None:
    assert isinstance(load(path), GrayScottRun)
    assert isinstance(load(ROOT / "launch" / "configs" / "sea_surface.toml"), FieldRun)
    field = path.with_name("field.toml")
    field.write_text('[problem]\npath = "a.nc"\nvariable = "a"\nvalidation = 1\nwindow = 1\n[training]\nepochs = 1\n')
    assert isinstance(load(field), FieldRun)


def test_what_is_left_out_has_the_defaults_of_petscs_example(path: Path) -> None:
    config = load(path)
    assert isinstance(config, GrayScottRun)
    parameters = config.problem.parameters
    assert (parameters.diffusion, parameters.feed, parameters.kill) == ((8e-5, 4e-5), 0.024, 0.06)
    assert parameters.domain == (2.5, 2.5)


def test_the_resolved_configuration_reads_back_as_itself(path: Path) -> None:
    config = load(path, ["problem.processes=[1, 2]", "problem.feed=0.03"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())
    assert load(resolved) == config


def test_the_shipped_configuration_is_valid() -> None:
    shipped = load(ROOT / "launch" / "configs" / "gray_scott.toml")
    assert isinstance(shipped, GrayScottRun)
    assert shipped.run.name == "gray_scott"
    assert max(shipped.evaluation.leads) == shipped.problem.times - 1
