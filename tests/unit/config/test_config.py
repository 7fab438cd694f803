"""Reading a configuration. What is wrong with wrong ones is in test_wrong_configurations.py."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pnode_dist.checkpointing.budget import Trajectory
from pnode_dist.config.load import load
from tests.conftest import ROOT

SHORTEST = """
[problem]
path = "sst.nc"
variable = "sst"
validation = 3
window = 2
[training]
epochs = 5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "shortest.toml"
    path.write_text(SHORTEST)
    return path


def test_what_is_left_out_has_defaults(path):
    config = load(path)

    assert (config.run.name, config.run.seed) == ("shortest", 0)
    assert config.run.path == Path("runs/shortest")
    assert (config.mesh.state, config.mesh.data, config.mesh.backend) == (None, 1, "mpi")
    assert (config.solver.method, config.solver.step_size) == ("rk4", None)
    assert config.training.keep == "last"


def test_the_shipped_configuration_is_valid():
    assert load(ROOT / "launch" / "configs" / "sea_surface.toml").run.name == "sea_surface"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.epochs=7", "training", "epochs", 7),
        ("training.learning_rate = 1e-2", "training", "learning_rate", 0.01),
        ("trajectory.ram=64MiB", "trajectory", "ram", "64MiB"),
        ("trajectory.ram=4096", "trajectory", "ram", 4096),
        ("problem.boundary=['zero', 'periodic']", "problem", "boundary", ("zero", "periodic")),
        ("solver.method=dopri5", "solver", "method", "dopri5"),
        ('solver.method="4"', "solver", "method", "4"),
        ("run.name=a = b", "run", "name", "a = b"),
        ("run.directory=", "run", "directory", ""),
        ("evaluation.leads=[2, 5]", "evaluation", "leads", (2, 5)),
        ("solver.petsc_options.ts_monitor=", "solver", "petsc_options", {"ts_monitor": ""}),
    ],
)
def test_an_override_is_a_toml_value_and_else_a_string(path, override, section, key, value):
    assert getattr(getattr(load(path, [override]), section), key) == value


def test_the_last_of_two_overrides_of_a_key_counts(path):
    assert load(path, ["training.epochs=7", "training.epochs=9"]).training.epochs == 9


def test_the_resolved_configuration_reads_back_as_itself(path):
    config = load(path, ["solver.petsc_options.ts_rk_type=8vr", "run.name=it's \u00e9tude", "mesh.state=2"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())

    assert load(resolved) == config
    assert tomllib.loads(config.to_toml())["training"]["learning_rate"] == 0.001


def test_a_petsc_option_without_a_value_is_handed_on_as_none(path):
    config = load(path, ["solver.petsc_options.ts_monitor=", "solver.petsc_options.ts_rk_type=8vr"])

    assert config.solver.options == {"ts_monitor": None, "ts_rk_type": "8vr"}


def test_the_trajectory_table_makes_the_budget(path):
    config = load(path, ["trajectory.ram=1MiB", "trajectory.disk_slots=3", "trajectory.directory=/scratch"])

    assert config.trajectory.build() == Trajectory(ram="1MiB", disk_slots=3, directory="/scratch")


def test_reading_a_configuration_loads_neither_torch_nor_petsc(path):
    program = (
        "import sys; from pnode_dist.config.load import load; load(sys.argv[1]);"
        "print([name for name in ('torch', 'petsc4py.PETSc', 'xarray') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
