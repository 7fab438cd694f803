"""A Slurm and an image for all tests here, and what they need of the system, installed where that can be done.

Those that need the image are marked so: they may run in a process beside the others.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image as images
from tests.cluster import namespaces
from tests.cluster.slurm import PACKAGES, Slurm, cluster

# Other tests may run beside these, and the machine be slow.
TIMEOUT = 3600


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-tests-in-image", action="store_true", help="run all tests in the image, not some of them")


# Before pytest selects by marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT, method="thread"))
        if "image" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.image)
            item.add_marker(pytest.mark.nightly)


def install(programs: tuple[str, ...], packages: tuple[str, ...]) -> None:
    """Install Debian packages unless the programs are there; skip the test, with the reason, where that cannot be."""
    absent = [program for program in programs if shutil.which(program) is None]
    if not absent:
        return
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"needs {', '.join(absent)}, and root and apt-get to install them")
    apt = ["apt-get", "-qy", "-o", "DPkg::Lock::Timeout=900"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # apt-get does not wait for another one's update.
    with (Path(tempfile.gettempdir()) / "pnode-dist-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (["update"], ["install", "--no-install-recommends", *packages]):
            done = subprocess.run(
                [*apt, *arguments], env=quiet, capture_output=True, text=True, check=False, timeout=1200
            )
            if done.returncode != 0:
                pytest.skip(f"apt-get cannot install {', '.join(packages)}: {done.stderr.strip().splitlines()[-1:]}")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of two cores each, on a network of their own."""
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    install(("slurmctld", "slurmd", "sbatch", "munged"), PACKAGES)
    with cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[images.Image]:
    """The image of docker/Dockerfile, built anew."""
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    install(("buildah", "crun", "debootstrap"), images.PACKAGES)
    with images.built(tmp_path_factory.mktemp("image")) as image:
        yield image
