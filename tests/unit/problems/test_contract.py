"""What every registered problem promises, on one rank."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh
from pnode_dist.cli.main import main
from pnode_dist.config.registry import installed
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.planning import plan_case
from pnode_dist.train.run import build_problem
from pnode_dist.verify.gradcheck import gradcheck
from tests.unit.problems.configurations import FORECASTS, SMALL, are_equal, parts_of, trained

EVERY = pytest.mark.parametrize("name", SMALL)
TOO_LARGE = {"problem.window": "999", "evaluation.leads": "[1, 999]"}


@pytest.fixture(autouse=True)
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """How exactly the largest stable step is found does not matter here."""
    monkeypatch.setattr("pnode_dist.problems.semilinear.stable_step.STEPS", 60)


def built(name: str, mesh: Mesh, directory: Path, **tables: Any) -> Any:
    return build_problem(SMALL[name](directory, **tables), mesh, torch.float64)


def test_every_registered_problem_has_a_small_configuration() -> None:
    assert set(installed()) == set(SMALL)


@EVERY
def test_a_problem_is_found_and_named_by_its_configuration(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(name, mesh, tmp_path)
    assert problem.name == (problem.config.problem.variable if name == "field" else name)
    assert math.prod(problem.partition.global_shape) > 0


@EVERY
def test_the_batches_of_an_epoch_are_fixed_by_seed_and_epoch(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem, other = (built(name, mesh, tmp_path, run={"seed": seed}) for seed in (1, 2))
    first, again, next_epoch, otherwise = (
        [parts_of(batch) for batch in batches]
        for batches in (problem.batches(1), problem.batches(1), problem.batches(2), other.batches(1))
    )
    assert len(first) == len(again) == len(next_epoch) > 1
    assert all(map(are_equal, first, again))
    assert not all(map(are_equal, first, next_epoch))
    assert not all(map(are_equal, first, otherwise))


@EVERY
def test_an_epoch_can_be_begun_at_any_batch(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(name, mesh, tmp_path)
    whole = [parts_of(batch) for batch in problem.batches(2)]
    for done in (1, len(whole) - 1):
        rest = [parts_of(batch) for batch in problem.batches(2, done)]
        assert len(rest) == len(whole) - done
        assert all(map(are_equal, rest, whole[done:]))


@EVERY
@pytest.mark.usefixtures("every_snapshot")
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(name: str, mesh: Mesh, tmp_path: Path) -> None:
    config = SMALL[name](tmp_path, training={"epochs": 1, "validate_every": 1})
    parameters, records = trained(config, mesh, tmp_path)
    resumed, again = trained(config, mesh, tmp_path, step=1)
    assert sum(record["kind"] == "step" for record in records) > 1
    assert torch.equal(resumed, parameters)
    assert again == records


@EVERY
def test_the_gradient_check_passes(name: str, mesh: Mesh, tmp_path: Path) -> None:
    result = gradcheck(built(name, mesh, tmp_path).gradcheck_case(), mesh)
    assert result.failures() == []
    assert result.relative_error < 1e-7


@EVERY
def test_the_solve_of_a_batch_is_the_one_that_is_planned(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(name, mesh, tmp_path)
    case = problem.solve_case()
    plans = plan_case(case)
    with torch.no_grad():
        case.solve(case.state, case.times, *case.args)
    assert plans.chosen.steps == case.solve.last_solve.forward_steps > 0


@pytest.mark.parametrize("name", FORECASTS)
def test_the_solve_case_is_that_of_a_training_batch(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(name, mesh, tmp_path)
    case = problem.solve_case()
    with torch.no_grad():
        states = case.solve(case.state, case.times, *case.args)
        torch.testing.assert_close(states[1:], problem.model(next(problem.batches(1))))


@EVERY
def test_a_run_is_trained_evaluated_and_drawn_from_its_files_alone(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, path = tmp_path / "run", tmp_path / "small.toml"
    path.write_text(SMALL[name](tmp_path, run={"directory": str(directory)}, training={"epochs": 1}).to_toml())
    assert main(["train", str(path)]) == 0
    path.unlink()
    capfd.readouterr()
    assert main(["evaluate", str(directory), "--json"]) == 0
    table = json.loads(capfd.readouterr().out)
    assert {"config.toml", "model.pt", "forecast.h5", "report.png"} <= {file.name for file in directory.iterdir()}
    assert table["forecast"] == str(directory / "forecast.h5")
    assert table["report"] == str(directory / "report.png")
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")
    with xarray.open_dataset(directory / "forecast.h5", engine="h5netcdf") as data:
        assert set(data.sizes) <= set(data.coords)
        assert all(np.isfinite(data[name]).any() for name in data.data_vars if data[name].dtype.kind == "f")


@pytest.mark.parametrize("name", FORECASTS)
def test_a_forecast_is_judged_by_the_leads_of_its_configuration(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(name, mesh, tmp_path)
    with torch.no_grad():
        figures = problem.validation(problem.model)
    first, *others = figures
    assert first.startswith("validation_")
    assert others == [f"lead_{lead}" for lead in problem.config.evaluation.leads]
    assert all(value > 0 for value in figures.values())


@EVERY
@pytest.mark.usefixtures("undrawn")
def test_a_run_directory_that_cannot_be_written_is_named(name: str, mesh: Mesh, tmp_path: Path) -> None:
    problem = built(name, mesh, tmp_path)
    with (
        torch.no_grad(),
        pytest.raises(ConfigurationError, match=r"gone/forecast.h5: cannot be written: .*No such file or directory"),
    ):
        problem.evaluate(problem.model, tmp_path / "gone")


@pytest.mark.parametrize("name", FORECASTS)
@pytest.mark.parametrize("key", TOO_LARGE)
def test_what_reaches_beyond_the_data_is_one_line_that_names_the_key(
    name: str, key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL[name](tmp_path, run={"directory": str(tmp_path / "run")}).to_toml())
    capfd.readouterr()
    assert main(["train", str(path), "--set", f"{key}={TOO_LARGE[key]}"]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    table, _, entry = key.partition(".")
    assert f"[{table}] {entry} = {TOO_LARGE[key]}: must be at most" in line


@EVERY
def test_a_budget_without_room_for_a_checkpoint_is_refused(name: str, mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"ram = 1, disk = 0: too small for one checkpoint of \d+ bytes"):
        built(name, mesh, tmp_path, trajectory={"ram": 1})
