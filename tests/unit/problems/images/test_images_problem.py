"""The images problem on one rank: loss and gradient, training, evaluation, and what cannot be done."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from pnode_dist.problems.images import cifar10
from pnode_dist.problems.images.problem import ImagesProblem
from pnode_dist.train import loop
from tests.oracles.right_hand_sides import distance
from tests.unit.problems.images.plain_images import (
    binary_file,
    cifar_part,
    config,
    plain_network,
    renamed,
    whole_batches,
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One rank as one state, for the whole file."""
    with Mesh() as mesh:
        yield mesh


def built(mesh: Mesh, **tables: Any) -> ImagesProblem:
    return ImagesProblem(config(**tables), mesh, torch.float64)


# Training


def test_an_epoch_has_every_training_image_once_each_varied_as_the_epoch_says(mesh: Mesh) -> None:
    problem = built(mesh)
    batches = list(problem.batches(2))
    numbers = [number for batch in batches for number in batch.numbers]
    assert sorted(numbers) == list(range(len(problem.data.training)))
    for batch, (images, labels) in zip(batches, whole_batches(problem, 2), strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)


def test_loss_and_gradient_are_those_of_plain_steps_and_torch_s_batch_norms(mesh: Mesh) -> None:
    problem = built(mesh)
    plain = plain_network(problem)
    batch = next(problem.batches(1))
    loss = problem.loss(problem.model, batch)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(plain(batch.images), batch.labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found = renamed({name: value.grad for name, value in problem.model.named_parameters()})
    for name, value in plain.named_parameters():
        assert (found[name] - value.grad).abs().max() <= 1e-12, name
    statistics = renamed(problem.model.state_dict())
    for name, value in plain.named_buffers():
        assert distance(statistics[name].double(), value.double()) <= 1e-12, name


def test_an_activation_with_a_kink_is_not_checked(mesh: Mesh) -> None:
    problem = built(mesh, model={"activation": "relu"})
    with pytest.raises(ConfigurationError, match=r'^\[model\] activation = "relu": has a kink'):
        problem.gradcheck_case()


def test_a_short_training_lowers_loss_and_validation_error(mesh: Mesh, tmp_path: Path) -> None:
    wider = {"stem": 16, "widths": (16, 16), "features": 16}
    training = {"epochs": 5, "learning_rate": 0.1, "validate_every": 1}
    problem = built(mesh, model=wider, training=training, problem={"shift": 0})
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    errors = [record["figures"]["validation_error"] for record in records if record["kind"] == "validation"]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert outcome.figures["validation_error"] == errors[-1] < 0.8 * errors[0]
    # Midpoint steps of two groups; every step is reversed once.
    steps = next(record for record in records if record["kind"] == "step")
    assert (steps["forward_steps"], steps["adjoint_steps"]) == (4, 4)


def test_the_groups_solves_share_one_budget(mesh: Mesh) -> None:
    first, second = (block.solve.trajectory for block in built(mesh, trajectory={"ram": "4MiB"}).model.blocks)
    assert first is second
    assert (first.ram, first.solves) == ("4MiB", 2)


def test_the_solve_case_is_the_first_group_s_of_a_training_batch(mesh: Mesh) -> None:
    problem = built(mesh)
    case = problem.solve_case()
    assert case.state.shape == (problem.config.training.batch_size, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(case.solve(case.state, case.times), problem.model.blocks[0](case.state))


# Evaluation


@pytest.mark.usefixtures("undrawn")
def test_evaluate_gives_the_counts_of_a_naive_computation(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(mesh)
    problem.model.eval()
    plain = plain_network(problem).eval()
    with torch.no_grad():
        table = problem.evaluate(problem.model, tmp_path)
        figures = problem.validation(problem.model)
        test, validation = problem.data.test, problem.data.validation
        probabilities = plain(problem.data.normalised(test.images, torch.float64)).softmax(dim=1)
        watched = plain(problem.data.normalised(validation.images, torch.float64)).softmax(dim=1)
    taken = probabilities.argmax(dim=1).tolist()
    labels = test.labels.tolist()
    pairs = list(zip(labels, taken, strict=True))
    for number, (row, counts) in enumerate(zip(table["classes"], table["confusion"], strict=True)):
        assert counts == {"class": str(number), **{str(other): pairs.count((number, other)) for other in range(10)}}
        assert row["images"] == labels.count(number)
        assert row["recall"] == pairs.count((number, number)) / labels.count(number)
        named = taken.count(number)
        assert row["precision"] == (pairs.count((number, number)) / named if named else None)
    right = sum(label == other for label, other in pairs)
    assert table["accuracy"] == right / len(labels)
    assert table["misclassified"] == len(labels) - right
    entropy = -np.mean([np.log(row[label]) for row, label in zip(probabilities.tolist(), labels, strict=True)])
    assert table["cross_entropy"] == pytest.approx(entropy, rel=1e-12)
    wrong = watched.argmax(dim=1).numpy() != validation.labels
    assert list(figures) == ["validation_error", "validation_loss"]
    assert figures["validation_error"] == pytest.approx(wrong.mean(), rel=1e-14)
    assert json.loads(json.dumps(table)) == table
    data = xarray.open_dataset(tmp_path / "forecast.h5", engine="h5netcdf")
    assert data["probability"].dims == ("sample", "class")
    np.testing.assert_allclose(data["probability"], probabilities, rtol=1e-10)
    with h5py.File(tmp_path / "forecast.h5") as file:
        np.testing.assert_array_equal(file["image"][:], test.images)
        np.testing.assert_array_equal(file["label"][:], test.labels)


# What cannot be done


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trajectory": {"ram": 300}}, "ram = 300, disk = 0: too small for one checkpoint of 21504 bytes"),
        (
            {"problem": {"validation": 0.0}, "training": {"keep": "best"}},
            r'\[training\] keep = "best": needs images that it is not judged by',
        ),
        (
            {"model": {"widths": (4, 4, 4), "strides": (2, 2, 2)}, "training": {"batch_size": 108}},
            r"\[training\] batch_size = 108: leaves a batch of one image of one point",
        ),
        ({"problem": {"test": 0.9999}}, r"\[problem\] test = 0.9999: leaves a part of 1797 images without any"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(mesh: Mesh, tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        built(mesh, **tables)


# From the command line


def test_a_run_is_evaluated_from_its_files_with_its_running_statistics(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, path = tmp_path / "run", tmp_path / "small.toml"
    path.write_text(config(run={"directory": str(directory)}, problem={"validation": 0.0}).to_toml())
    assert main(["train", str(path)]) == 0
    path.unlink()
    capfd.readouterr()
    assert main(["evaluate", str(directory), "--json"]) == 0
    table = json.loads(capfd.readouterr().out)
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["figures"]
    assert 1 - table["accuracy"] == pytest.approx(last["test_error"], rel=1e-12)
    assert table["cross_entropy"] == pytest.approx(last["test_loss"], rel=1e-12)
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_cifar10_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    monkeypatch.setattr(cifar10, "RECORDS", 4)
    for seed, name in enumerate((*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")):
        (tmp_path / f"{name}.bin").write_bytes(binary_file(*cifar_part(4, seed)))
    images = {"type": "images", "data": "cifar10", "path": str(tmp_path), "validation": 0.0, "shift": 4, "flip": True}
    problem = ImagesProblem(
        config(training={"epochs": 1}).model_copy(update={"problem": _validated(images)}), mesh, torch.float32
    )
    assert (len(problem.data.training), len(problem.data.test)) == (20, 4)
    (tmp_path / "run").mkdir()
    outcome = loop.train(problem, problem.config.training, mesh, tmp_path / "run")
    assert 0 <= outcome.figures["test_error"] <= 1


def test_without_its_files_cifar10_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    images = {"type": "images", "data": "cifar10", "path": str(tmp_path / "nowhere")}
    path.write_text(config().model_copy(update={"problem": _validated(images)}).to_toml())
    assert main(["train", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pnode-dist: error: [problem] path = '{tmp_path}/nowhere': there is no such folder")


def _validated(table: dict[str, Any]) -> Any:
    return type(config().problem).model_validate(table)
