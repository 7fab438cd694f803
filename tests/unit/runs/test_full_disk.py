"""A run whose disk is really full, or is taken away, ends in one line; with room it goes on to the same end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from pnode_dist.cli.main import main
from pnode_dist.runs import snapshot_files

pytestmark = pytest.mark.usefixtures("every_snapshot")


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk):
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1024)):
            pass


def test_a_full_disk_leaves_the_last_snapshot_as_it_was(config_file, disk, tmp_path, capfd):
    train = ["train", str(config_file), "--set", "snapshot.every_steps=1", "--run-dir"]
    assert main([*train, str(tmp_path / "whole")]) == 0
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == 5:
            fill(disk)

    hook = register_optimizer_step_post_hook(count)
    capfd.readouterr()
    try:
        assert main([*train, str(disk / "run")]) == 1
    finally:
        hook.remove()

    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pnode-dist")]
    found = re.fullmatch(
        rf"pnode-dist: error: run directory {disk}/run: cannot write the \w+: No space left on device; the last "
        r"snapshot is that of step (\d)",
        said,
    )
    assert found, said
    step = int(found[1])
    assert step == snapshot_files.steps_in(disk / "run")[0] == 4
    snapshot_files.check(snapshot_files.path_of(disk / "run", step))
    assert not list((disk / "run" / "snapshots").glob(".*"))

    (disk / "ballast").unlink()
    assert main([*train, str(disk / "run"), "--resume", "auto"]) == 0

    ended, meant = (torch.load(run / "model.pt", weights_only=True) for run in (disk / "run", tmp_path / "whole"))
    assert all(torch.equal(ended[name], meant[name]) for name in meant)


def test_a_model_that_cannot_be_saved_ends_the_run_in_one_line_as_well(config_file, disk, capfd):
    # The parameters are saved after the last step, and no snapshot before.
    hook = register_optimizer_step_post_hook(lambda *_: fill(disk))
    try:
        assert (
            main(["train", str(config_file), "--set", "snapshot.every_minutes=0", "--run-dir", str(disk / "run")]) == 1
        )
    finally:
        hook.remove()
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pnode-dist")]
    assert "No space left on device; there is no snapshot" in said


def test_a_run_directory_that_is_removed_ends_the_run_in_one_line(config_file, tmp_path, capfd):
    run = tmp_path / "run"
    hook = register_optimizer_step_post_hook(lambda *_: shutil.rmtree(run, ignore_errors=True))
    try:
        assert main(["train", str(config_file), "--set", "snapshot.every_steps=1"]) == 1
    finally:
        hook.remove()
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pnode-dist")]
    assert re.fullmatch(rf"pnode-dist: error: run directory {run}: .+; there is no snapshot", said), said
    assert not run.exists()
