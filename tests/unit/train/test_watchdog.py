"""A rank that hangs ends the job, and every rank says where it is."""

from __future__ import annotations

import sys

from tests.conftest import ROOT

# Time is what the program says, so that it does not matter how slow the machine is.
HANGING = """
import sys, time
from pathlib import Path
import torch
from pnode_dist import Mesh, NeuralODE
from pnode_dist.ode import safe_points
from pnode_dist.train import watchdog

LIMIT = 1.0

class Clock:
    now, looks = 0.0, 0

    def monotonic(self):
        self.looks += 1
        return self.now

    def sleep(self, seconds):
        # Before a rank ends the others.
        while not Path(f"said{1 - mesh.rank}").exists():
            time.sleep(0.01)
        time.sleep(seconds)

    def wait_for_looks(self):
        enough = self.looks + 2
        while self.looks < enough:
            time.sleep(0.01)

class Watched(watchdog.Watchdog):
    def _print_stacks(self, why):
        super()._print_stacks(why)
        Path(f"said{mesh.rank}").touch()

def stuck():
    clock.now += 2 * LIMIT
    while True:
        time.sleep(0.01)

watchdog.time = clock = Clock()
with Mesh() as mesh, Watched(mesh, LIMIT) as watched, safe_points.watched(watched):
    node = NeuralODE(lambda t, u: -u, step_size=0.01)
    for _ in range(4):
        node(torch.ones(3, dtype=torch.float64), [0.0, 1.0])
        clock.wait_for_looks()
        clock.now += 0.9 * LIMIT
    print("solved", flush=True)
    if mesh.rank == 1:
        stuck()
    mesh.barrier()
"""


def test_every_rank_prints_its_stacks_with_its_number_and_host(mpirun, tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)

    ended = mpirun(2, sys.executable, "hanging.py", PYTHONPATH=str(ROOT))

    assert ended.returncode == 70
    # While they get on, they are left alone for longer than the limit.
    assert ended.stdout.count("solved") == 2
    for rank, function in ((0, "barrier"), (1, "in stuck")):
        lines = [line for line in ended.stderr.splitlines() if line.startswith(f"[rank {rank} on ")]
        assert any(function in line for line in lines), ended.stderr
    assert "([run] hang_limit = 1)" in ended.stderr
