"""The Dockerfile passes its linter, and what compose.yaml brings up is closed to the outside."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from pnode_dist.cli.main import parser
from tests.conftest import ROOT

DOCKER = ROOT / "docker"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_the_image_is_labelled_with_the_package_s_version() -> None:
    from pnode_dist import __version__

    assert f'org.opencontainers.image.version="{__version__}"' in (DOCKER / "Dockerfile").read_text()


def test_no_service_can_be_reached_from_outside_or_has_privileges(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"keys", "head", "worker1", "worker2", "serve"}
    assert compose["networks"] == {"mpi": {"internal": True}, "serve": {}}
    for name, service in compose["services"].items():
        assert service["networks"] == ["serve" if name == "serve" else "mpi"]
        assert service["cap_drop"] == ["ALL"]
        assert service.get("ports", []) == (["127.0.0.1:4242:4242"] if name == "serve" else [])
        assert not {"privileged", "network_mode", "cap_add"} & set(service)


def test_the_head_runs_on_the_workers_that_there_are(compose: dict[str, Any]) -> None:
    hosts = [line.partition(":")[0] for line in (DOCKER / "hosts").read_text().splitlines()]
    assert hosts == [name for name in compose["services"] if name.startswith("worker")]
    assert f"Host {' '.join(hosts)}\n" in (DOCKER / "ssh_config").read_text()
    assert "docker/hosts" in compose["services"]["head"]["command"]


def test_the_service_starts_only_where_it_is_named_and_takes_its_arguments(compose: dict[str, Any]) -> None:
    service = compose["services"]["serve"]
    assert service["profiles"] == ["serve"]
    launcher, command = service["command"][:3], service["command"][3:]
    assert launcher == ["mpirun.sh", "-n", "2"]
    assert command[0] == "pnode-dist"
    arguments = parser().parse_args(command[1:])
    assert (arguments.host, arguments.port, arguments.insecure) == ("0.0.0.0", 4242, True)
    assert (ROOT / arguments.source).is_file()


def test_workers_take_keys_and_nothing_else() -> None:
    lines = (DOCKER / "sshd_config").read_text().splitlines()
    for line in ("AuthenticationMethods publickey", "PasswordAuthentication no", "KbdInteractiveAuthentication no"):
        assert line in lines
