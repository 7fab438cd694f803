"""What the tables of a pendulum problem refuse, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.pendulum.config import PendulumRun
from tests.conftest import ROOT

SHORTEST = """
[problem]
type = "pendulum"
trajectories = 1
validation = 1
times = 5
interval = 0.1
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
    "problem.length=0": "[problem] length = 0: must be a number greater than 0",
    "problem.gravity=-9.81": "[problem] gravity = -9.81: must be a number of at least 0",
    "problem.drag=[0.1]": "[problem] drag = [0.1]: must be a list of 2 entries, each a number of at least 0",
    "problem.wind=strong": '[problem] wind = "strong": must be a number',
    "problem.largest_angle=4.0": (
        "[problem] largest_angle = 4.0: must be a number greater than 0 and of at most 3.141592653589793"
    ),
    "problem.largest_speed=-1.0": "[problem] largest_speed = -1.0: must be a number of at least 0",
    "problem.interval=0": "[problem] interval = 0: must be a number greater than 0",
    "problem.window=5": "[problem] window = 5: must be at most 4, one less than times",
    "problem.mass=1": "[problem] unknown key mass: must be one of type,",
    "model.hidden=[]": "[model] hidden = []: must be a list of at least 1 entry, each an integer of at least 1",
    "model.activation=relu": '[model] activation = "relu": must be one of gelu, silu, tanh',
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_is_allowed(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, [override])
    line = str(caught.value)
    assert line.startswith(f"--set {override}: {WRONG[override]}")
    assert "\n" not in line


def test_the_resolved_configuration_reads_back_as_itself(path: Path) -> None:
    config = load(path, ["problem.wind=-1.0", "model.hidden=[3]"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())
    assert load(resolved) == config


def test_the_shipped_configuration_is_valid() -> None:
    shipped = load(ROOT / "launch" / "configs" / "pendulum.toml")
    assert isinstance(shipped, PendulumRun)
    assert shipped.run.name == "pendulum"
    assert (shipped.solver.method, shipped.solver.preconditioner) == ("cn", "block")
    assert max(shipped.evaluation.leads) == shipped.problem.times - 1
