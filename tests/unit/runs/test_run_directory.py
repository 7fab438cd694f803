from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from pnode_dist.config.load import load
from pnode_dist.config.tables import Config
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.config import FieldRun
from pnode_dist.runs import directory as run_directory


@pytest.fixture
def config() -> Config:
    return FieldRun.model_validate(
        {
            "run": {"name": "test"},
            "problem": {"path": "sst.nc", "variable": "sst", "validation": 3, "window": 2},
            "training": {"epochs": 5},
        }
    )


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_new_directory_is_for_its_owner_only_and_says_what_made_it(config, mesh, tmp_path):
    directory = tmp_path / "runs" / "test"

    run_directory.create(directory, config, mesh, overwrite=False)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert files(directory) == {"config.toml", "versions.json"}
    assert load(directory / "config.toml") == config
    versions = json.loads((directory / "versions.json").read_text())
    assert (versions["ranks"], versions["mesh"]) == (1, {"state": 1, "data": 1, "backend": "mpi"})
    # The wheels of PyPI tell the build, as +cu124, in one of the two alone.
    assert versions["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(versions["hosts"]) == 1


def test_an_empty_directory_is_free(config, mesh, tmp_path):
    run_directory.create(tmp_path, config, mesh, overwrite=False)

    assert files(tmp_path) == {"config.toml", "versions.json"}


def test_a_directory_with_anything_in_it_is_refused_and_left_alone(config, mesh, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"is not empty: choose another with --run-dir, or --overwrite it"):
        run_directory.create(tmp_path, config, mesh, overwrite=False)

    assert files(tmp_path) == {"notes.txt"}


def test_overwriting_removes_the_files_of_a_run_and_no_others(config, mesh, tmp_path):
    for name in ("notes.txt", "metrics.jsonl", "model.pt", "forecast.h5", "report.png"):
        (tmp_path / name).write_text("old")

    run_directory.create(tmp_path, config, mesh, overwrite=True)

    assert files(tmp_path) == {"notes.txt", "config.toml", "versions.json"}
    assert (tmp_path / "notes.txt").read_text() == "old"


def test_a_file_in_the_place_of_the_directory_is_refused(config, mesh, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigurationError, match="run: there is a file of that name"):
        run_directory.create(tmp_path / "run", config, mesh, overwrite=True)


def test_a_directory_that_cannot_be_made_is_refused_in_one_line(config, mesh, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"^run directory \S+: \w.*$"):
        run_directory.create(tmp_path / "file" / "run", config, mesh, overwrite=False)


def test_a_save_that_fails_keeps_the_old_parameters(mesh, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    model = nn.Linear(2, 1)
    run_directory.save_parameters(model, path, mesh)
    before = path.read_bytes()

    def fail(parameters, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        run_directory.save_parameters(model, path, mesh)

    assert path.read_bytes() == before
    assert files(tmp_path) == {"model.pt"}


def test_running_statistics_are_saved_but_no_buffer_of_one_rank_s_field(mesh, tmp_path):
    model, again = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model.register_buffer("part", torch.ones(2), persistent=False)
    model(torch.randn(5, 3))
    run_directory.save_parameters(model, tmp_path / "model.pt", mesh)

    run_directory.load_parameters(again, tmp_path / "model.pt")

    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert torch.equal(again.running_var, model.running_var)
    assert again.running_mean.abs().max() > 0


def test_parameters_come_back_in_the_models_own_type(mesh, tmp_path):
    single, double = nn.Linear(2, 1), nn.Linear(2, 1).double()
    run_directory.save_parameters(single, tmp_path / "model.pt", mesh)

    run_directory.load_parameters(double, tmp_path / "model.pt")

    assert double.weight.dtype == torch.float64
    assert torch.equal(double.weight, single.weight.double())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file: the run has not saved its model"),
        (b"", "cannot be read as saved parameters"),
        (b"not a zip file", "cannot be read as saved parameters"),
        ({"weight": torch.zeros(1, 2)}, "holds other parameters than the configured model has"),
        ([1, 2], "holds other parameters than the configured model has"),
        (
            {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)},
            r"weight has shape \(1, 3\), in the configured model \(1, 2\)",
        ),
    ],
)
def test_parameters_that_are_not_the_models_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigurationError, match=rf"^\S+model.pt: {message}.*$") as caught:
        run_directory.load_parameters(nn.Linear(2, 1), path)
    assert "\n" not in str(caught.value)


def test_code_in_a_model_file_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"weight": Attack()}, tmp_path / "model.pt")
    with pytest.raises(ConfigurationError, match="cannot be read as saved parameters"):
        run_directory.load_parameters(nn.Linear(2, 1), tmp_path / "model.pt")
    assert not (tmp_path / "harm").exists()
