"""The tables of the quasi-geostrophic problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pnode_dist.problems.qg.config import EDDY, JET, QGConfig, QGModelConfig, QGParameters
from tests.unit.problems.qg.plain_qg import config


def problem(**changes: Any) -> QGConfig:
    return config(Path("gone"), problem=changes).problem


def test_the_published_configurations_are_those_of_the_benchmark() -> None:
    assert (EDDY.rek, EDDY.delta, EDDY.beta) == (5.787e-7, 0.25, 1.5e-11)
    assert (JET.rek, JET.delta, JET.beta) == (7e-8, 0.1, 1e-11)
    assert {(one.L, one.rd, one.H1, one.U1, one.U2, one.filterfac) for one in (EDDY, JET)} == {
        (1e6, 15e3, 500.0, 0.025, 0.0, 23.6)
    }


def test_a_key_that_is_given_replaces_the_published_value() -> None:
    assert problem(configuration="jet", L=None).parameters == JET
    assert problem(configuration="jet", L=2e6, U2=0.01).parameters == QGParameters(
        2e6, delta=0.1, beta=1e-11, U2=0.01, rek=7e-8
    )
    assert problem(rek=0.0).parameters.rek == 0.0


def test_steps_are_counted_from_hours() -> None:
    assert problem(fine_step=0.5, interval=1.5, spin_up=0.0).steps == (0, 3)
    assert problem(fine_step=0.1, interval=0.3, spin_up=100.0).steps == (1000, 3)
    assert problem(fine_step=0.5, interval=1.5).step_seconds == 1800.0


def test_steps_on_the_coarse_grid_are_as_long_as_its_cells_allow() -> None:
    # Cells are twice as long, and so are steps: at most 4 hours.
    assert problem(coarse_spin_up=12.0).coarse_steps == (3, 4 * 3600.0)
    assert problem(coarse_spin_up=10.0).coarse_steps == (3, pytest.approx(12_000.0, rel=1e-15))
    assert problem(coarse_spin_up=0.3, fine_step=0.1).coarse_steps == (2, pytest.approx(540.0, rel=1e-15))
    assert problem(coarse_spin_up=0.6, fine_step=0.1).coarse_steps == (3, pytest.approx(720.0, rel=1e-15))
    assert problem().coarse_steps == (0, 0.0)


def test_samples_of_long_runs_are_samples_of_the_truth(tmp_path: Path) -> None:
    long = {"free_run": 12.0}
    assert config(tmp_path, evaluation=long | {"free_run_interval": 12.0}).evaluation.free_run_interval == 12.0
    for interval, message in (
        (6.0, r"free_run_interval = 6 must be a whole number of \[problem\] interval = 4"),
        (16.0, r"free_run_interval\n.*must be at most free_run = 12"),
    ):
        with pytest.raises(ValidationError, match=message):
            config(tmp_path, evaluation=long | {"free_run_interval": interval})


def test_stages_of_the_curriculum_follow_each_other() -> None:
    found = problem(window=4, curriculum=[[2, 1], [1, 3]])
    assert [found.window_of(epoch) for epoch in range(1, 7)] == [1, 1, 3, 4, 4, 4]
    assert problem(window=4).window_of(1) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (7, 12)}, "shape\n.*must be even"),
        ({"fine": (16, 20)}, r"fine\n.*must be in the proportion of shape = \[8, 12\]"),
        ({"fine": (8, 12)}, r"fine\n.*and more points"),
        ({"interval": 3.0}, "interval\n.*must be a whole number of fine_step = 2"),
        ({"spin_up": 1.0}, "spin_up\n.*must be a whole number of fine_step = 2"),
        ({"curriculum": [[1, 3]]}, "curriculum\n.*must have windows of at most 2, which is window"),
        ({"curriculum": [[1, 1]], "objective": "offline"}, 'curriculum\n.*needs objective = "online"'),
        ({"configuration": "ring"}, "configuration\n.*'eddy' or 'jet'"),
        ({"operator": "real"}, "operator\n.*'sharp', 'gaussian' or 'diffusion'"),
        ({"operator": "diffusion", "fine": (20, 30)}, r"operator\n.*needs fine = \[20, 30\] to be a whole multiple of"),
        ({"rd": 0.0}, "rd\n.*greater than 0"),
        ({"unknown": 1}, "unknown\n.*not permitted"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        problem(**changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kernel": 4}, "kernel\n.*must be odd"),
        ({"layers": 1}, "layers\n.*greater than or equal to 2"),
        ({"closure": "fcnn", "channels": 8}, 'channels\n.*must be left out with closure = "fcnn"'),
        ({"closure": "unet"}, "closure\n.*'cnn' or 'fcnn'"),
    ],
)
def test_sizes_that_a_closure_does_not_have_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QGModelConfig.model_validate(table)
