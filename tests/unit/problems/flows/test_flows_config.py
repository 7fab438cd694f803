"""What the tables of a flows problem refuse, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.flows.config import FlowsRun
from tests.conftest import ROOT

SHORTEST = """
[problem]
type = "flows"
density = "moons"
[training]
epochs = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(SHORTEST)
    return path


WRONG = {
    "problem.density=spirals": '[problem] density = "spirals": must be one of moons, rings, pinwheel, 8gaussians,',
    "problem.density=power": "[problem] directory = null: must be the folder that holds power/data.npy",
    "problem.directory=here": '[problem] directory = "here": must be given with density = power or miniboone or',
    "problem.density=gaussian": '[problem] covariance = []: must be the rows of a square matrix with density = "gauss',
    "problem.covariance=[[1.0]]": '[problem] covariance = [[1.0]]: must be given with density = "gaussian" only',
    "problem.samples=0": "[problem] samples = 0: must be an integer of at least 1",
    "model.trace=hutch": '[model] trace = "hutch": must be one of exact, hutchinson',
    "model.noise=cauchy": '[model] noise = "cauchy": must be one of gaussian, rademacher',
    "model.activation=relu": '[model] activation = "relu": must be one of silu, softplus, tanh',
    "model.kinetic=-1.0": "[model] kinetic = -1.0: must be a number of at least 0",
    "model.flows=0": "[model] flows = 0: must be an integer of at least 1",
    "evaluation.leads=[1]": "[evaluation] unknown key leads: must be one of samples, cells",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_is_allowed(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, [override])
    line = str(caught.value)
    assert WRONG[override] in line
    assert "\n" not in line


def test_a_mean_must_fit_the_covariance(path: Path) -> None:
    overrides = ["problem.density=gaussian", "problem.mean=[0.0]", "problem.covariance=[[1.0, 0.0], [0.0, 1.0]]"]
    with pytest.raises(ConfigurationError, match="must be a matrix of 1 rows, as mean has 1 entries"):
        load(path, overrides)


def test_the_resolved_configuration_reads_back_as_itself(path: Path) -> None:
    config = load(path, ["problem.density=gaussian", "problem.covariance=[[1.0, 0.5], [0.5, 1.0]]", "model.flows=2"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())
    assert load(resolved) == config


@pytest.mark.parametrize(
    ("name", "density"),
    [
        ("flow_moons", "moons"),
        ("flow_gaussian", "gaussian"),
        ("flow_diabetes", "diabetes"),
        ("flow_miniboone", "miniboone"),
    ],
)
def test_the_shipped_configurations_are_valid(name: str, density: str) -> None:
    shipped = load(ROOT / "launch" / "configs" / f"{name}.toml")
    assert isinstance(shipped, FlowsRun)
    assert (shipped.run.name, shipped.problem.density) == (name, density)
