"""The image of docker/Dockerfile, built without a daemon on a base of Debian's packages, from wheels that pip has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PACKAGES = ("buildah", "crun", "debootstrap")
_BASE, _NAME = "docker.io/library/debian:bookworm-slim", "localhost/pnode-dist"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BUILDS, _RUNS = 1800.0, 300.0
# What a machine needs to reach its package archive.
_ACCESS = (
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d",
    "/etc/apt/apt.conf.d",
    "/usr/local/share/ca-certificates",
)
# In memory, which nobody else sees, because package managers wait for the disk at every file. All that pip may take is
# among the wheels.
_MAKE_BASE = """
archive=$1 root=$2 packed=$3
shift 3
mount -t tmpfs -o size=1g tmpfs "$root"
debootstrap --variant=minbase bookworm "$root" "$archive"
for file; do if [ -e "$file" ]; then cp -r --parents "$file" "$root"; fi; done
printf '[global]\\nno-index = true\\n' >"$root/etc/pip.conf"
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe"
tar -C "$root" -cf "$packed" .
"""
_AT_ONCE = 4


@dataclass(frozen=True)
class Image:
    """The built image, in a storage of its own; `rootfs` is the directory that a container of it sees as its root."""

    environment: dict[str, str]
    container: str
    rootfs: Path

    def inside(self, *command: str, options: tuple[str, ...] = ()) -> list[str]:
        """A command line that runs `command` in a container of it, as its user and in its directory."""
        return ["buildah", "run", "--isolation", "chroot", *options, self.container, "--", *command]

    def run(self, *command: str, timeout: float = _RUNS) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of it."""
        return subprocess.run(
            self.inside(*command), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )


@contextmanager
def built(lab: Path) -> Iterator[Image]:
    """Build the image in `lab`, an empty directory, which is removed afterwards. Takes minutes."""
    driver = "overlay" if "\toverlay\n" in Path("/proc/filesystems").read_text() else "vfs"
    storage = lab / "storage.conf"
    storage.write_text(f'[storage]\ndriver="{driver}"\ngraphroot="{lab}/graph"\nrunroot="{lab}/run"\n')
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}

    def buildah(*arguments: str) -> str:
        done = subprocess.run(
            ["buildah", *arguments], env=environment, capture_output=True, text=True, timeout=_BUILDS, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"buildah {' '.join(arguments)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout.strip()

    try:
        downloads = _start_downloads(lab / "wheels")
        try:
            packed = _make_base(lab)
        finally:
            _finish(downloads)
        base = buildah("from", "scratch")
        buildah("add", "--quiet", base, str(packed), "/")
        buildah("config", "--cmd", "/bin/bash", "--env", f"PATH={_PATH}", base)
        buildah("commit", "--quiet", "--rm", base, _BASE)
        wheels = f"wheels={lab}/wheels"
        buildah(
            "bud",
            "--format",
            "docker",
            "--pull-never",
            "--build-context",
            wheels,
            "--tag",
            _NAME,
            "--file",
            "docker/Dockerfile",
            str(ROOT),
        )
        container = buildah("from", "--pull-never", _NAME)
        rootfs = Path(buildah("mount", container))
        # Where charliecloud's own conversion writes what ch-run --set-env reads.
        template = "{{range .OCIv1.Config.Env}}{{println .}}{{end}}"
        (rootfs / "ch").mkdir()
        (rootfs / "ch" / "environment").write_text(buildah("inspect", "--format", template, container) + "\n")
        yield Image(environment, container, rootfs)
    finally:
        for arguments in (["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run(["buildah", *arguments], env=environment, capture_output=True, check=False, timeout=60)
        shutil.rmtree(lab, ignore_errors=True)


def _start_downloads(directory: Path) -> list[subprocess.Popen[bytes]]:
    """Have pip put wheels of all pinned packages into `directory`; those of PETSc are what was compiled here."""
    directory.mkdir()
    kept = sorted((Path(sys.prefix) / ".pnode-dist-wheels").glob("petsc*.whl"))
    for wheel in kept:
        shutil.copy(wheel, directory)
    compiled = {wheel.name.partition("-")[0] for wheel in kept}
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if "==" in line and line.partition("==")[0] not in compiled]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    return [
        subprocess.Popen(
            [*pip, "--wheel-dir", str(directory), *pins[start::_AT_ONCE], *(["editables"] if start == 0 else [])]
        )
        for start in range(_AT_ONCE)
    ]


def _finish(downloads: list[subprocess.Popen[bytes]]) -> None:
    failed = []
    for download in downloads:
        try:
            failed.append(download.wait(_BUILDS))
        except subprocess.TimeoutExpired:
            download.kill()
            failed.append(download.wait())
    if any(failed):
        raise RuntimeError(f"pip cannot get the pinned packages: exit codes {failed}")


def _make_base(directory: Path) -> Path:
    """A minimal Debian as debian:bookworm-slim is one, from the archive that this machine uses, as a tar file."""
    wanted = ("--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages")
    listed = subprocess.run(["apt-get", "indextargets", *wanted], capture_output=True, text=True, check=True).stdout
    archives = [line.partition(" ")[2] for line in listed.splitlines() if line.startswith("bookworm ")]
    if not archives:
        raise RuntimeError("apt-get knows no archive of Debian bookworm")
    (directory / "base").mkdir()
    packed = directory / "base.tar"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", _MAKE_BASE, "sh", archives[0], directory / "base", packed, *_ACCESS],
        capture_output=True,
        text=True,
        timeout=_BUILDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return packed
