"""The flows problem on one rank: batches, loss, training, evaluation, and the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray

from pnode_dist import Mesh
from pnode_dist.cli.main import main
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.flows.problem import FlowsProblem
from pnode_dist.train import loop
from pnode_dist.verify.gradcheck import gradcheck
from tests.unit.problems.flows.plain_flows import config, density, leaves_of, sampled

REGULARISED = {"kinetic": 0.3, "jacobian": 0.2, "flows": 2}
NOISES = [{"trace": "exact"}, {"trace": "hutchinson", "noise": "gaussian"}, {"trace": "hutchinson"}]
NAMES = ["exact", "gaussian noise", "rademacher noise"]


def built(mesh: Mesh, **tables: Any) -> FlowsProblem:
    return FlowsProblem(config(**tables), mesh, torch.float64)


@pytest.fixture
def problem(mesh: Mesh) -> FlowsProblem:
    """The small problem."""
    return built(mesh)


# Training


def test_the_batches_of_an_epoch_are_all_rows_once_in_another_order_each_time(problem: FlowsProblem) -> None:
    batches = list(problem.batches(1))
    assert [len(batch.samples) for batch in batches] == [9, 9, 5]
    rows = torch.cat([batch.samples for batch in batches])
    assert sorted(rows.tolist()) == sorted(problem.data.training.tolist())
    assert not torch.equal(rows, torch.cat([batch.samples for batch in problem.batches(2)]))
    assert all(batch.noise is None for batch in batches)


def test_noise_is_drawn_anew_for_every_batch_and_the_same_for_the_same_seed(mesh: Mesh) -> None:
    problem = built(mesh, model={"trace": "hutchinson"})
    first, again, later = (
        [batch.noise for batch in built(mesh, model={"trace": "hutchinson"}).batches(epoch)] for epoch in (1, 1, 2)
    )
    for one, same in zip(first, again, strict=True):
        assert one is not None
        assert same is not None
        assert torch.equal(one, same)
        assert torch.equal(one.abs(), torch.ones_like(one))
    (resumed,) = built(mesh, model={"trace": "hutchinson"}).batches(1, 2)
    assert resumed.noise is not None
    assert first[2] is not None
    assert torch.equal(resumed.noise, first[2])
    assert len({tuple(noise.flatten()[:10].tolist()) for noise in (*first, *later) if noise is not None}) == 6
    gaussian = next(built(mesh, model={"trace": "hutchinson", "noise": "gaussian"}).batches(1)).noise
    assert gaussian is not None
    assert not torch.equal(gaussian.abs(), torch.ones_like(gaussian))
    assert problem.validation(problem.model) == built(mesh).validation(problem.model)


@pytest.mark.parametrize("model", NOISES, ids=NAMES)
def test_loss_and_gradient_are_those_of_plain_torch(mesh: Mesh, model: dict[str, Any]) -> None:
    problem = built(mesh, model=REGULARISED | model)
    batch = next(problem.batches(1))
    found = problem.loss(problem.model, batch)
    found.backward()  # type: ignore[no-untyped-call]
    flows = leaves_of(problem.model)
    _, log_density, kinetic, jacobian = density(flows, batch.samples, batch.noise)
    loss = (-log_density + 0.3 * kinetic + 0.2 * jacobian).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    expected = [value.grad for own in flows for value in own.values()]
    for value, wanted in zip(problem.model.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", NOISES, ids=NAMES)
def test_the_gradient_check_passes(mesh: Mesh, model: dict[str, Any]) -> None:
    problem = built(mesh, model=REGULARISED | model)
    result = gradcheck(problem.gradcheck_case(), mesh)
    assert result.failures() == []
    assert result.relative_error < 1e-8
    assert result.state_size == 23 * 2


def test_every_flow_is_counted_and_has_its_share_of_the_budget(mesh: Mesh) -> None:
    problem = built(mesh, model={"flows": 3}, trajectory={"ram": "3kB", "keep": "solution"})
    problem.loss(problem.model, next(problem.batches(1))).backward()  # type: ignore[no-untyped-call]
    cost = problem.solve_statistics()
    assert (cost.forward_steps, cost.adjoint_steps) == (12, 12)
    # 9 samples of z and log p are 216 bytes: a third of the budget holds the 3 checkpoints of a flow.
    assert 0 < cost.checkpoint_bytes_peak <= 3000
    with pytest.raises(ConfigurationError, match="too small for one checkpoint"):
        built(mesh, model={"flows": 3}, trajectory={"ram": "400B", "keep": "solution"})


def test_a_short_training_lowers_the_loss(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, training={"epochs": 15, "learning_rate": 0.03, "validate_every": 1})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    figures = [record["figures"]["validation_nll"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.5
    assert outcome.figures["validation_nll"] == figures[-1] < figures[0] - 0.3


# Evaluation


@pytest.mark.usefixtures("undrawn")
def test_evaluate_gives_the_figures_of_plain_torch(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, model={"flows": 2})
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    flows, data = leaves_of(problem.model), problem.data
    assert data.log_density is not None
    learnt = density(flows, torch.from_numpy(data.test))[1].detach().numpy()
    expected = {
        "flow": learnt,
        "fitted_normal": data.fitted.log_density(data.test),
        "truth": data.log_density(data.test),
    }
    assert [row["of"] for row in table["log_likelihood"]] == list(expected)
    for row in table["log_likelihood"]:
        values = expected[row["of"]]
        assert row["nats"] == pytest.approx(values.mean(), rel=1e-10)
        assert row["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(13), rel=1e-10)
    assert table["short_of_truth"]["nats"] == pytest.approx((expected["truth"] - learnt).mean(), rel=1e-9)
    validation = density(flows, torch.from_numpy(data.validation))[1].mean().item()
    assert problem.validation(problem.model) == {"validation_nll": pytest.approx(-validation, rel=1e-12)}
    assert json.loads(json.dumps(table)) == table

    file = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    base = torch.from_numpy(np.random.default_rng([3, 3]).normal(size=(7, 2)))
    samples, drawn = sampled(flows, base)
    np.testing.assert_allclose(file["samples"], samples.detach(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(file["sample_log_density"], drawn.detach(), rtol=1e-10, atol=1e-12)
    origin, back, *_ = density(flows, samples)
    assert table["inversion_error"] == pytest.approx((origin - base).abs().max().item(), rel=1e-4, abs=1e-12)
    assert table["log_density_error"] == pytest.approx((back - drawn).abs().max().item(), rel=1e-4, abs=1e-12)
    np.testing.assert_allclose(file["test_log_density_flow"], learnt, rtol=1e-10, atol=1e-12)
    assert file["paths"].shape == (2 * 12 + 1, 7, 2)
    points = np.stack(np.meshgrid(file["x"], file["y"]), axis=-1).reshape(-1, 2)
    mapped = density(flows, torch.from_numpy(points))[1].detach().numpy()
    np.testing.assert_allclose(file["log_density"].to_numpy().ravel(), mapped, rtol=1e-9, atol=1e-11)
    cell = float(file["x"][1] - file["x"][0]) * float(file["y"][1] - file["y"][0])
    assert table["integral"] == pytest.approx(np.exp(mapped).sum() * cell, rel=1e-9)
    assert file["true_log_density"].dims == ("y", "x")


def test_an_accurate_flow_is_a_density_that_integrates_to_one(mesh: Mesh, tmp_path: Path) -> None:
    # More than the map's cells is needed for a flow that is nothing like a normal distribution.
    problem = built(mesh, solver={"step_size": 0.1}, evaluation={"cells": 60}, problem={"samples": 300})
    with torch.no_grad():
        for value in problem.model.parameters():
            value.mul_(1.6)
        table = problem.evaluate(problem.model, tmp_path)
    assert table["integral"] == pytest.approx(1, abs=0.01)
    assert table["inversion_error"] < 1e-3
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("undrawn")
def test_a_flow_without_a_truth_or_a_map_is_judged_by_what_there_is(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, problem={"density": "pinwheel"})
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    assert [row["of"] for row in table["log_likelihood"]] == ["flow", "fitted_normal"]
    assert "short_of_truth" not in table
    assert "integral" in table
    iris = built(mesh, problem={"density": "iris"})
    with torch.no_grad():
        table = iris.evaluate(iris.model, tmp_path)
    assert (table["dimension"], table["density"]) == (4, "iris")
    assert "integral" not in table
    with h5py.File(tmp_path / "forecast.h5") as file:
        assert file["test"].shape == (30, 4)
        assert "log_density" not in file


def test_the_report_of_a_table_is_drawn(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh, problem={"density": "iris"})
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
    assert table["report"] == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


# From the command line


def test_a_missing_folder_is_one_clear_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "boone.toml"
    path.write_text(config(problem={"density": "miniboone", "directory": str(tmp_path)}).to_toml())
    assert main(["train", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "must be the folder that holds miniboone/data.npy" in line
