"""launch/srun.sh starts ranks on the nodes of a real Slurm, and mistakes are told from the work of one rank."""

from __future__ import annotations

import json
import signal

import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.test_jobs import SLOWLY

pytestmark = pytest.mark.cluster


def test_ranks_on_two_nodes_see_each_other(slurm: Slurm) -> None:
    done = slurm.run("launch/srun.sh", "-N", "2", "-n", "4", "pnode-dist", "doctor", "--json", timeout=SLOWLY)
    findings = json.loads(done.stdout)
    assert findings["problems"] == []
    assert [rank["host"] for rank in findings["ranks"]] == ["node1", "node1", "node2", "node2"]


def test_ranks_that_come_up_as_singletons_are_told_so_once(slurm: Slurm) -> None:
    command = ("launch/srun.sh", "--mpi=none", "-n", "2", "pnode-dist", "gradcheck", "launch/configs/pendulum.toml")
    done = slurm.run(*command, timeout=SLOWLY, check=False)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("pnode-dist")]
    assert said == [
        "pnode-dist: error: srun started 2 tasks but MPICH connects only 1: start with launch/srun.sh, or add "
        "--mpi=pmi2 to srun"
    ]


def test_ranks_do_not_wait_for_one_that_has_died(slurm: Slurm) -> None:
    program = 'test "$SLURM_PROCID" = 0 && kill -KILL $$; sleep 100000'
    command = ("launch/srun.sh", "-N", "2", "-n", "2", "sh", "-c", program)
    done = slurm.run(*command, timeout=SLOWLY, check=False, SLURM_WAIT="2")
    assert done.returncode == 128 + signal.SIGKILL
    assert "node1: task 0: Killed" in done.stderr
