"""What the tables of a Robertson problem refuse, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.robertson.config import RobertsonRun
from tests.conftest import ROOT

SHORTEST = """
[problem]
type = "robertson"
trajectories = 1
validation = 1
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
    "problem.rates=[1.0, 0.0, 1.0]": "[problem] rates[1] = 0.0: must be a number greater than 0",
    "problem.times=1": "[problem] times = 1: must be an integer of at least 2",
    "problem.first=0.0": "[problem] first = 0.0: must be a number greater than 0",
    "problem.last=1e-6": "[problem] last = 1e-06: must be greater than 1e-05, the first",
    "problem.highest=[0.4, 1e-5, 1.0]": (
        "[problem] highest = [0.4, 1e-05, 1.0]: must be at least [0.5, 0.0, 0.0], the lowest"
    ),
    "problem.lowest=[-1.0, 0.0, 0.0]": "[problem] lowest[0] = -1.0: must be a number of at least 0",
    "problem.validation=0": "[problem] validation = 0: must be an integer of at least 1",
    "problem.window=40": "[problem] window = 40: must be at most 39, one less than times",
    "problem.widow=4": "[problem] unknown key widow (did you mean window?): must be one of type,",
    "model.hidden=[]": "[model] hidden = []: must be a list of at least 1 entry, each an integer of at least 1",
    "model.hidden=[4, 0]": "[model] hidden[1] = 0: must be an integer of at least 1",
    "model.bias=1.5": "[model] bias = 1.5: must be true or false",
    "model.activation=relu": '[model] activation = "relu": must be one of gelu, silu, tanh',
    "rival.method=cn": '[rival] method = "cn": must be an explicit method with an error estimate, such as dopri5',
    "rival.method=rk4": '[rival] method = "rk4": must be an explicit method with an error estimate, such as dopri5',
    "rival.method=dopri": '[rival] method = "dopri": must be one of euler,',
    "rival.rtol=0.0": "[rival] rtol = 0.0: must be a number greater than 0",
    "rival.steps=0": "[rival] steps = 0: must be an integer of at least 1",
    "rivals.steps=1": "unknown table [rivals] (did you mean [rival]?)",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_is_allowed(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, [override])
    line = str(caught.value)
    assert line.startswith(f"--set {override}: {WRONG[override]}")
    assert "\n" not in line


def test_what_is_missing_is_named(path: Path) -> None:
    path.write_text(SHORTEST.replace("trajectories = 1\n", ""))
    with pytest.raises(ConfigurationError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: [problem] trajectories is missing: must be an integer of at least 1"


def test_what_is_left_out_has_the_values_of_the_paper(path: Path) -> None:
    config = load(path)
    assert isinstance(config, RobertsonRun)
    assert config.problem.rates == (0.04, 3e7, 1e4)
    assert (config.problem.first, config.problem.last, config.problem.times) == (1e-5, 100.0, 40)
    assert (config.model.hidden, config.model.bias, config.model.activation) == ((6, 6, 6, 6, 6), False, "gelu")
    assert config.rival.method == "dopri5"


def test_the_resolved_configuration_reads_back_as_itself(path: Path) -> None:
    config = load(path, ["problem.lowest=[0.9, 0.0, 0.0]", "rival.steps=7"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())
    assert load(resolved) == config


def test_the_shipped_configuration_is_valid() -> None:
    shipped = load(ROOT / "launch" / "configs" / "robertson.toml")
    assert isinstance(shipped, RobertsonRun)
    assert shipped.run.name == "robertson"
    assert (shipped.solver.method, shipped.solver.preconditioner) == ("cn", "block")
    assert max(shipped.evaluation.leads) == shipped.problem.times - 1
