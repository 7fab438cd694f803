"""`[training] device`: which device a rank takes, and a model that computes there with its problem on the host."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pnode_dist import ConfigurationError, Mesh
from pnode_dist.cli.main import main
from pnode_dist.config.tables import TrainingConfig
from pnode_dist.train import device as devices
from pnode_dist.train.device import device_of, place
from pnode_dist.train.run import build_problem
from tests.conftest import PATIENCE
from tests.oracles.other_device import Hidden, needs_other_device, other_device
from tests.unit.problems.configurations import SMALL

BY_DAY = ("gray_scott", "graph_diffusion")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:11", "auto"])
def test_devices_are_read(name: str) -> None:
    assert TrainingConfig(epochs=1, device=name).device == name


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "", "CUDA"])
def test_other_names_of_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be cpu, cuda, cuda:N with the number of a GPU, or auto"):
        TrainingConfig(epochs=1, device=name)


@pytest.mark.parametrize(
    ("name", "count", "rank", "found"),
    [
        ("cpu", 0, 0, "cpu"),
        ("auto", 0, 0, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 2, 0, "cuda:0"),
        ("cuda", 2, 1, "cuda:1"),
        ("cuda", 2, 3, "cuda:1"),
        # A launcher that shows each rank a GPU of its own.
        ("cuda", 1, 3, "cuda:0"),
        ("cuda:1", 2, 0, "cuda:1"),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_on_the_node(
    name: str, count: int, rank: int, found: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    monkeypatch.setattr(devices, "_local_rank", lambda mesh: rank)
    assert device_of(name, mesh) == torch.device(found)


@pytest.mark.parametrize(
    ("name", "count", "seen"), [("cuda", 0, "no GPU"), ("cuda:0", 0, "no GPU"), ("cuda:3", 2, r"2 GPU\(s\)")]
)
def test_a_device_that_is_not_there_is_one_clear_line(
    name: str, count: int, seen: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    wanted = (
        f"^training.device = '{name}': torch finds {seen} on rank 0: must be cpu, auto, or a GPU that every rank has$"
    )
    with pytest.raises(ConfigurationError, match=wanted):
        device_of(name, mesh)


def test_a_missing_device_ends_training_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus(monkeypatch, 0)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "robertson.toml"
    assert main(["config", "init", "robertson"]) == 0
    path.write_text(capsys.readouterr().out)
    assert main(["train", str(path), "--set", "training.device=cuda"]) == 2
    assert "training.device = 'cuda': torch finds no GPU on rank 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


@dataclass(frozen=True)
class Given:
    values: torch.Tensor
    others: Pair
    name: str


class Doubling(nn.Module):
    """Twice its inputs, all of which must be on the device of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]))
        self.seen: list[int] = []

    def forward(self, given: Given, *, scale: torch.Tensor) -> dict[str, Any]:
        self.seen.append(id(given.others.first))
        assert given.name == "kept"
        parts = [given.values, given.others.first, given.others.second[0], scale]
        assert all(isinstance(part, Hidden) for part in parts)
        return {"double": self.factor * given.values * scale, "rest": [2 * part for part in parts[1:]], "none": None}


def nested_there() -> list[Any]:
    model = Doubling()
    factor = model.factor
    del model._parameters["factor"]
    model.factor = nn.Parameter(factor.detach().to(other_device()))
    place(model, other_device())
    kept = torch.tensor([5.0])
    found = []
    for step in range(2):
        given = Given(torch.tensor([1.0 + step]), Pair(kept, [torch.tensor([7.0])]), "kept")
        output = model(given, scale=torch.tensor([1.0]))
        assert not any(isinstance(part, Hidden) for part in (output["double"], *output["rest"]))
        output["double"].sum().backward()
        found.append([output["double"].item(), *(part.item() for part in output["rest"])])
    same = model.seen[0] == model.seen[1]
    kept.add_(1.0)
    model(Given(kept, Pair(kept, [kept]), "kept"), scale=kept)
    gradient = model.factor.grad
    assert gradient is not None
    return [found, same, model.seen[2] == model.seen[1], gradient.cpu().item()]


def summed_there() -> list[float]:
    with Mesh() as mesh:
        value = torch.tensor([1.0, 2.0]).to(other_device())
        dist.all_reduce(value, group=mesh.world_group)
        gathered = torch.zeros(2).to(other_device())
        dist.broadcast(gathered, 0, group=mesh.world_group)
        parts = [torch.zeros(2).to(other_device())]
        dist.all_gather(parts, value, group=mesh.world_group)
        assert all(isinstance(each, Hidden) for each in (value, *parts))
        return [*value.cpu().tolist(), *parts[0].cpu().tolist()]


def solved(name: str, directory: Path, there: bool) -> tuple[float, list[np.ndarray[Any, Any]], dict[str, float]]:
    """The loss, its gradient and the validation of the first batch."""
    with Mesh() as mesh:
        problem = build_problem(SMALL[name](directory), mesh, torch.float64)
        if there:
            for module in problem.model.modules():
                for key, value in list(module._parameters.items()):
                    if value is not None:
                        module._parameters[key] = nn.Parameter(value.detach().to(other_device()))
            place(problem.model, other_device())
        loss = problem.loss(problem.model, next(problem.batches(1)))
        assert not isinstance(loss, Hidden)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [value.grad for value in problem.model.parameters() if value.grad is not None]
        assert gradients
        assert all(isinstance(value, Hidden) == there for value in gradients)
        with torch.no_grad():
            errors = problem.validation(problem.model)
        return loss.item(), [value.cpu().numpy() for value in gradients], errors


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    # torch takes no further device after the first backward pass of a process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


@needs_other_device
@pytest.mark.slow
def test_inputs_go_to_the_device_and_outputs_come_back(elsewhere: Executor) -> None:
    found, same, changed, gradient = elsewhere.submit(nested_there).result(PATIENCE)
    assert found == [[2.0, 10.0, 14.0, 2.0], [4.0, 10.0, 14.0, 2.0]]
    assert same
    assert not changed
    assert gradient == 3.0


@needs_other_device
@pytest.mark.slow
def test_the_mpi_backend_takes_tensors_of_a_device_through_the_host(elsewhere: Executor) -> None:
    assert elsewhere.submit(summed_there).result(PATIENCE) == [1.0, 2.0, 1.0, 2.0]


@needs_other_device
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in BY_DAY else pytest.param(name, marks=pytest.mark.nightly) for name in SMALL]
)
def test_every_problem_learns_the_same_with_its_model_on_a_device(
    name: str, elsewhere: Executor, tmp_path: Path
) -> None:
    there = elsewhere.submit(solved, name, tmp_path, True).result(PATIENCE)
    loss, gradients, errors = solved(name, tmp_path, False)
    assert there[0] == pytest.approx(loss, rel=1e-12)
    largest = max(np.abs(wanted).max() for wanted in gradients)
    for found, wanted in zip(there[1], gradients, strict=True):
        assert np.abs(found - wanted).max() <= 1e-12 * largest
    assert there[2] == pytest.approx(errors, rel=1e-10)
