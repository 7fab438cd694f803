"""What the tables [problem] and [model] of the semilinear problems refuse, and the equations that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.semilinear.config import BurgersRun, KuramotoSivashinskyRun, LineEquation
from tests.conftest import ROOT

SHORTEST = """
[problem]
type = "kuramoto_sivashinsky"
points = 96
trajectories = 1
validation = 1
times = 5
interval = 1
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
    "problem.points=7": "[problem] points = 7: must be an integer of at least 8",
    "problem.length=0": "[problem] length = 0: must be a number greater than 0",
    "problem.length=192.0": "[problem] length = 192.0: must be less than 192, twice the number of points, so that",
    "problem.viscosity=1.0": "[problem] unknown key viscosity: must be one of type, seed,",
    "problem.seed=-1": "[problem] seed = -1: must be an integer of at least 0",
    "problem.times=1": "[problem] times = 1: must be an integer of at least 2",
    "problem.interval=0": "[problem] interval = 0: must be a number greater than 0",
    "problem.window=5": "[problem] window = 5: must be at most 4, one less than times",
    "problem.spin_up=-1": "[problem] spin_up = -1: must be a number of at least 0",
    "problem.validation=0": "[problem] validation = 0: must be an integer of at least 1",
    "problem.trajectores=2": "[problem] unknown key trajectores (did you mean trajectories?): must be one of type,",
    "model.layers=1": "[model] layers = 1: must be an integer of at least 2",
    "model.kernel_size=4": "[model] kernel_size = 4: must be odd, so that the line keeps its size",
    "model.activation=relu": '[model] activation = "relu": must be one of gelu, silu, tanh',
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_is_allowed(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, [override])
    line = str(caught.value)
    assert line.startswith(f"--set {override}: {WRONG[override]}")
    assert "\n" not in line


def test_a_length_that_is_left_out_must_suit_the_points_too(path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"\[problem\] length = 176.0: must be less than 160, twice the number"
    ):
        load(path, ["problem.points=80"])


def test_a_viscosity_that_is_not_positive_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\[problem\] viscosity = 0: must be a number greater than 0"):
        load(path, ["problem.type=burgers", "problem.viscosity=0"])


def test_the_type_of_the_problem_chooses_the_equation(path: Path) -> None:
    chaos, fronts = load(path), load(path, ["problem.type=burgers", "problem.viscosity=0.25"])
    assert isinstance(chaos, KuramotoSivashinskyRun)
    assert isinstance(fronts, BurgersRun)
    assert chaos.problem.equation == LineEquation("Kuramoto-Sivashinsky", 176.0, -1.0, -1.0, 28)
    assert fronts.problem.equation == LineEquation("viscous Burgers", 1.0, 0.25, 0.0, 4)
    assert (chaos.problem.spin_up, fronts.problem.spin_up) == (50.0, 0.0)


def test_initial_states_of_a_short_line_have_a_wave(path: Path) -> None:
    config = load(path, ["problem.length=1.0"])
    assert isinstance(config, KuramotoSivashinskyRun)
    assert config.problem.equation.waves == 1


@pytest.mark.parametrize("kind", ["kuramoto_sivashinsky", "burgers"])
def test_the_resolved_configuration_reads_back_as_itself(path: Path, kind: str) -> None:
    config = load(path, [f"problem.type={kind}", "problem.length=3.5"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())
    assert load(resolved) == config


@pytest.mark.parametrize("kind", [KuramotoSivashinskyRun, BurgersRun])
def test_the_shipped_configurations_have_512_points_and_implicit_explicit_steps(kind: type) -> None:
    name = "burgers" if kind is BurgersRun else "kuramoto_sivashinsky"
    shipped = load(ROOT / "launch" / "configs" / f"{name}.toml")
    assert isinstance(shipped, kind)
    assert shipped.run.name == name
    assert shipped.solver.method.startswith("arkimex_")
    assert isinstance(shipped, KuramotoSivashinskyRun | BurgersRun)
    assert shipped.problem.points == 512
    assert max(shipped.evaluation.leads) == shipped.problem.times - 1
