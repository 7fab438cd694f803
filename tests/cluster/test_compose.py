"""The containers of docker/compose.yaml reach each other as it says: by name, on a network of their own, with keys."""

from __future__ import annotations

import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.cluster.image import Image
from tests.cluster.namespaces import boot, connect, make_switch, wait_until
from tests.conftest import PATIENCE, ROOT

pytestmark = pytest.mark.cluster

_ADDRESSES = {"head": "10.78.0.254", "worker1": "10.78.0.1", "worker2": "10.78.0.2"}


def test_the_head_checks_a_gradient_across_both_workers(image: Image, tmp_path: Path) -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    made = image.run(*services["keys"]["command"])
    assert made.returncode == 0, made.stderr
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in _ADDRESSES.items()))

    def within(*command: str) -> list[str]:
        return image.inside(*command, hosts=hosts)

    with ExitStack() as running:
        head = boot("head", _ADDRESSES["head"], "exec sleep 100000", tmp_path / "head.log", hosts)
        running.callback(head.stop)
        make_switch(head)
        for name in ("worker1", "worker2"):
            serving = shlex.join(within(*services[name]["command"]))
            worker = boot(name, _ADDRESSES[name], f"exec {serving}", tmp_path / f"{name}.log", hosts)
            running.callback(worker.stop)
            connect(worker, head)

        def on_head(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
            return subprocess.run(head.inside(*command), capture_output=True, text=True, timeout=timeout, check=False)

        def serves(name: str) -> bool:
            return on_head("bash", "-c", f"exec 3<>/dev/tcp/{name}/2222", timeout=PATIENCE).returncode == 0

        for name in ("worker1", "worker2"):
            wait_until(lambda name=name: serves(name), PATIENCE, f"{name}: {(tmp_path / f'{name}.log').read_text()}")
        program = [*services["head"]["command"], "--json"]
        done = on_head(*within(*program), timeout=1200)
        assert done.returncode == 0, done.stderr
        assert '"ranks": 2' in done.stdout
        assert '"failures": []' in done.stdout
        # Nobody without the key gets in.
        stranger = ["ssh", "-o", "IdentityFile=/dev/null", "-o", "IdentitiesOnly=yes", "-F", "/dev/null", "-p", "2222"]
        trusting = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"]
        refused = on_head(*within(*stranger, *trusting, "pnode@worker1", "true"), timeout=PATIENCE)
        assert refused.returncode == 255
        assert "Permission denied (publickey)" in refused.stderr
