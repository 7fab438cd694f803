"""A node that the network loses in a training: nothing waits for it, and the run goes on once it is back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pnode_dist.runs import snapshot_files
from tests.cluster.namespaces import cut_off, plug_in, wait_until
from tests.cluster.slurm import Slurm
from tests.cluster.test_jobs import CONFIG, SLOWLY, settings, train, wait_for_steps

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

HANG_LIMIT = 60.0


def ranks_of(run: Path) -> list[int]:
    """The processes, on all machines, that train into a run directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            starts = re.match(rb"python", Path(process / "exe").resolve().name.encode()) is not None
        except OSError:
            continue
        if starts and str(run).encode() in words:
            found.append(int(process.name))
    return found


def test_a_training_that_loses_a_node_ends_on_both_sides_says_so_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = train(slurm, run, epochs=100_000, **{"run.hang_limit": str(HANG_LIMIT)})
    wait_for_steps(slurm, job, run, 5)
    assert len(ranks_of(run)) == 2

    cut_off(slurm.nodes["node2"], slurm.head)
    try:
        wait_until(lambda: not ranks_of(run), HANG_LIMIT + SLOWLY, "the ranks to end")
        said = re.search(r"\[rank 0 on node1\] has not got on for ([\d.]+) s", slurm.output(job))
        assert said is not None, slurm.output(job)
        assert float(said[1]) > HANG_LIMIT
    finally:
        plug_in(slurm.nodes["node2"], slurm.head)

    # Slurm may have queued the job again meanwhile, if it was the first to notice.
    slurm.run("scancel", job, check=False)
    last = snapshot_files.path_of(run, snapshot_files.steps_in(run)[0])
    one_more = settings(**{"training.epochs": str(snapshot_files.read_label(last).epoch + 1)})
    command = ("launch/mpirun.sh", "-n", "2", "pnode-dist", "train", CONFIG, *one_more, "--run-dir", str(run))
    done = slurm.run(*command, "--resume", "auto", timeout=SLOWLY, check=False)
    assert done.returncode == 0, done.stderr
    assert f"from {last}" in done.stderr
