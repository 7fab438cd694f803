"""The service over two nodes of a real Slurm, by the contract of UM-Bridge's load balancer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.namespaces import wait_until
from tests.cluster.slurm import Slurm
from tests.cluster.test_jobs import CONFIG, ONE_RANK_A_NODE, SLOWLY, settings

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]

MODEL = "forecast_of_initial_state"
_CLIENT = """
import sys, urllib.request
url, path, body = sys.argv[1:]
request = urllib.request.Request(url + path, body.encode() or None)
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""


def ask(slurm: Slurm, url: str, path: str, body: Any = None) -> Any:
    """The answer to a client on the second node."""
    text = "" if body is None else json.dumps(body)
    # The ranks are one on each node, and the client takes the other core of the second.
    return json.loads(slurm.run("srun", "-w", "node2", "-n", "1", "python3", "-c", _CLIENT, url, path, text).stdout)


def test_a_client_on_another_node_uses_the_service_of_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    directory = tmp_path / "comm"
    balancer = {"UMBRIDGE_LOADBALANCER_COMM_FILEDIR": str(directory)}
    job = slurm.submit("serve.sbatch", CONFIG, *settings(), options=ONE_RANK_A_NODE, **balancer)
    url_file = directory / f"url-{job}.txt"
    wait_until(
        lambda: url_file.exists() or slurm.about(job)["JobState"] not in ("PENDING", "RUNNING", "CONFIGURING"),
        SLOWLY,
        f"the URL of job {job}",
    )
    assert url_file.exists(), slurm.output(job)
    url = url_file.read_text().strip()
    assert url.startswith("http://node1:")
    assert MODEL in ask(slurm, url, "/Info")["models"]
    request = {"name": MODEL, "input": [[0.1, -0.2]], "config": {"modes": 2, "leads": [1]}}
    (output,) = ask(slurm, url, "/Evaluate", request)["output"]
    derivative = {**request, "outWrt": 0, "inWrt": 0}
    gradient = ask(slurm, url, "/Gradient", {**derivative, "sens": [1.0]})["output"]
    tangents = [
        ask(slurm, url, "/ApplyJacobian", {**derivative, "vec": vec})["output"][0] for vec in ([1.0, 0.0], [0.0, 1.0])
    ]
    assert len(output) == 1
    assert gradient == pytest.approx(tangents, rel=1e-5)
    slurm.run("scancel", job)
    slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=SLOWLY)
    assert "ended: every request is answered" in slurm.output(job)
    assert not url_file.exists()
