"""A rank that hangs ends the job, and every rank says where it is."""

from __future__ import annotations

import sys
import time

from tests.conftest import ROOT

HANGING = """
import sys, time
import torch
from pnode_dist import Mesh, NeuralODE
from pnode_dist.ode import safe_points
from pnode_dist.train.watchdog import Watchdog

def stuck():
    while True:
        time.sleep(0.01)

with Mesh() as mesh, Watchdog(mesh, 1.0) as watchdog, safe_points.watched(watchdog):
    node = NeuralODE(lambda t, u: -u, step_size=0.01)
    began = time.monotonic()
    while time.monotonic() - began < 2.5:
        node(torch.ones(3, dtype=torch.float64), [0.0, 1.0])
    print("solved", flush=True)
    if mesh.rank == 1:
        stuck()
    mesh.barrier()
"""


def test_every_rank_prints_its_stacks_with_its_number_and_host(mpirun, tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)
    began = time.monotonic()

    ended = mpirun(2, sys.executable, "hanging.py", timeout=90, PYTHONPATH=str(ROOT))

    assert ended.returncode == 70
    # While they get on, they are left alone for longer than the limit.
    assert ended.stdout.count("solved") == 2
    for rank, function in ((0, "barrier"), (1, "in stuck")):
        lines = [line for line in ended.stderr.splitlines() if line.startswith(f"[rank {rank} on ")]
        assert any(function in line for line in lines), ended.stderr
    assert "([run] hang_limit = 1)" in ended.stderr
    assert time.monotonic() - began < 60
