"""The commands on all ranks: they end alike, rank 0 alone speaks, and every rank has done the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist.cli.main import main
from tests.unit.problems.field.synthetic_fields import config, dataset, values, write

pytestmark = pytest.mark.mpi

COMM = MPI.COMM_WORLD


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Rank 0's temporary directory, on all ranks."""
    shared: Path = COMM.bcast(tmp_path)
    return shared


@pytest.fixture
def config_file(directory: Path) -> Path:
    path = directory / "small.toml"
    if COMM.rank == 0:
        data = write(directory / "sst.nc", dataset(values()))
        changes: dict[str, Any] = {"run": {"name": "small", "directory": str(directory / "run")}}
        path.write_text(config(data, **changes).to_toml())
    COMM.barrier()
    return path


def steps(directory: Path) -> list[dict[str, Any]]:
    COMM.barrier()
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def test_training_and_evaluation_write_one_runs_files_and_rank_0_alone_speaks(config_file, directory, capfd):
    assert main(["train", str(config_file)]) == 0
    out, err = capfd.readouterr()
    assert [bool(out), bool(err)] == [COMM.rank == 0] * 2

    assert main(["evaluate", str(directory / "run"), "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    if COMM.rank == 0:
        assert [row["lead"] for row in json.loads(out)["rmse"]] == [1, 2, 3]
    else:
        assert out == ""
    versions = json.loads((directory / "run" / "versions.json").read_text())
    assert (versions["ranks"], len(versions["hosts"])) == (COMM.size, COMM.size)


def test_the_first_loss_and_gradient_norm_are_those_of_the_whole_batch(config_file, directory, capfd):
    from pnode_dist import Mesh
    from pnode_dist.config.load import load
    from pnode_dist.train.run import build_problem

    argv = ["train", str(config_file), "--set", "training.epochs=1", "--set", "training.dtype=float64"]
    assert main(argv) == 0

    with Mesh() as mesh:
        problem = build_problem(load(config_file), mesh, torch.float64)
        share = problem.loss(problem.model, next(problem.batches(1)))
        gradients = torch.autograd.grad(share, list(problem.model.parameters()))
        total = mesh.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        loss = mesh.sum(share)
    first = steps(directory)[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-13)
    assert first["gradient_norm"] == pytest.approx(total.norm().item(), rel=1e-12)


def test_disk_traffic_is_summed_over_ranks(config_file, directory, capfd):
    argv = ["train", str(config_file), "--set", "training.epochs=1"]
    assert main([*argv, "--set", "trajectory.ram_slots=0", "--set", "trajectory.disk_slots=2"]) == 0

    written = {record["bytes_written"] for record in steps(directory)}
    # Whole checkpoints of whole batches, whose parts the ranks wrote.
    assert all(size > 0 and size % (8 * 6 * 9) == 0 for size in written)


@pytest.mark.parametrize(
    ("command", "wrong", "expected"),
    [
        ("train", "--set training.epochs=0", "[training] epochs = 0: must be an integer of at least 1"),
        ("train", "--set problem.variable=salinity", "[problem] variable = 'salinity': not in the file"),
        ("train", f"--set mesh.state={COMM.size + 1}", f"but {COMM.size} rank(s) were started"),
        ("train", "--set trajectory.ram=8", "too small for one checkpoint of"),
        ("train", "--set solver.petsc_options.ts_type=bdf", "ts_type"),
        ("train", "--set model.dilations=[20]", f"cannot be split over {COMM.size} rank"),
        ("gradcheck", "--json --set trajectory.ram=8", "too small for one checkpoint of"),
        ("plan", "--ram 0 --disk 0", "trajectory: ram = '0'"),
        ("trian", "", "unknown command 'trian' (did you mean train?)"),
    ],
)
def test_a_wrong_command_or_configuration_ends_all_ranks_with_code_2_and_one_line(
    config_file, directory, capfd, command, wrong, expected
):
    assert main([command, str(config_file), *wrong.split()]) == 2

    out, err = capfd.readouterr()
    assert out == ""
    if COMM.rank == 0:
        (line,) = err.splitlines()
        assert line.startswith("pnode-dist: error: ")
        assert expected in line
    else:
        assert err == ""
    assert not (directory / "run").exists()


def test_a_loss_that_diverges_ends_all_ranks_with_code_1_and_one_line(config_file, capfd):
    assert main(["train", str(config_file), "--set", "training.learning_rate=1e20"]) == 1

    _, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == (1 if COMM.rank == 0 else 0)
    assert all("try a smaller learning_rate" in line for line in lines)


def test_data_replicas_share_the_batches_and_have_the_losses_of_a_single_one(config_file, directory, capfd):
    argv = ["train", str(config_file), "--set", "training.dtype=float64", "--set", "trajectory.ram=1MiB"]
    losses = []
    for replicas in (1, COMM.size):
        assert main([*argv, "--overwrite", "--set", f"mesh.data={replicas}"]) == 0
        losses.append([record["loss"] for record in steps(directory)])

    # Two epochs of 21 windows in batches of 4: the last ones are of a single window.
    assert len(losses[0]) == 2 * 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
