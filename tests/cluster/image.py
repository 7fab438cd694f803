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
_BUILDS, _RUNS = 3600.0, 1200.0
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
# MPICH's ranks that wait leave the cores to the tests beside these.
_SHARING = "MPIR_CVAR_ENABLE_HEAVY_YIELD=1"
# Version 1.28 of buildah, which Debian bookworm has, lets the kernel kill what it runs when one of its own threads ends
# (mended by its change 4813). What it builds is then built again; what runs in the image does not run under it.
_KILLED = "subprocess exited on killed"
# With the machine's devices and a view of the processes here, as a container has them.
_ENTER = """
root=$1 user=$2 directory=$3 hosts=$4
shift 4
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
if [ -n "$hosts" ]; then mount --bind "$hosts" "$root/etc/hosts"; fi
exec chroot --userspec="$user:$user" "$root" env --ignore-environment --chdir="$directory" "$@"
"""


@dataclass(frozen=True)
class Image:
    """The built image, in a storage of its own; `rootfs` is the directory that a container of it sees as its root."""

    rootfs: Path
    variables: tuple[str, ...]
    user: str
    directory: str

    def inside(self, *command: str, hosts: Path | None = None) -> list[str]:
        """A command line that runs `command` in a container of it, as its user and in its directory.

        `hosts` is what it reads for /etc/hosts.
        """
        enter = ("unshare", "--mount", "sh", "-euc", _ENTER, "sh", str(self.rootfs), self.user, self.directory)
        return [*enter, str(hosts or ""), *self.variables, _SHARING, *command]

    def run(self, *command: str, timeout: float = _RUNS) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of it."""
        return subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=timeout, check=False)


@contextmanager
def built(lab: Path) -> Iterator[Image]:
    """Build the image in `lab`, an empty directory, which is removed afterwards. Takes minutes."""
    driver = "overlay" if "\toverlay\n" in Path("/proc/filesystems").read_text() else "vfs"
    storage = lab / "storage.conf"
    storage.write_text(f'[storage]\ndriver="{driver}"\ngraphroot="{lab}/graph"\nrunroot="{lab}/run"\n')
    # Its caches are kept in the temporary directory.
    (lab / "tmp").mkdir()
    ours = {"CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(lab / "tmp")}
    environment = {**os.environ, **ours}

    def buildah(*arguments: str) -> str:
        for _ in range(3):
            done = subprocess.run(
                ["buildah", *arguments], env=environment, capture_output=True, text=True, timeout=_BUILDS, check=False
            )
            if _KILLED not in done.stderr:
                break
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

        def configured(template: str) -> str:
            return buildah("inspect", "--format", template, container)

        variables = configured("{{range .OCIv1.Config.Env}}{{println .}}{{end}}")
        # Where charliecloud's own conversion writes what ch-run --set-env reads.
        (rootfs / "ch").mkdir()
        (rootfs / "ch" / "environment").write_text(variables + "\n")
        user, directory = configured("{{.OCIv1.Config.User}}"), configured("{{.OCIv1.Config.WorkingDir}}")
        yield Image(rootfs, tuple(variables.splitlines()), user, directory)
    finally:
        # Nobody else knows of its storage: what is mounted is unmounted, and all goes with the directory.
        subprocess.run(["umount", *_mounted(lab)], capture_output=True, check=False, timeout=_RUNS)
        shutil.rmtree(lab, ignore_errors=True)


def _mounted(directory: Path) -> list[str]:
    """What is mounted in it, the innermost first."""
    places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    return [place for place in reversed(places) if place.startswith(f"{directory}/")]


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


def debian_archive() -> str:
    """The address of the archive of Debian that this machine uses. It holds all releases."""
    wanted = ("--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages")
    listed = subprocess.run(["apt-get", "indextargets", *wanted], capture_output=True, text=True, check=True).stdout
    archives = [line.partition(" ")[2] for line in listed.splitlines() if line.startswith("bookworm ")]
    if not archives:
        raise RuntimeError("apt-get knows no archive of Debian bookworm")
    return archives[0]


def _make_base(directory: Path) -> Path:
    """A minimal Debian as debian:bookworm-slim is one, from the archive that this machine uses, as a tar file."""
    (directory / "base").mkdir()
    packed = directory / "base.tar"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", _MAKE_BASE, "sh", debian_archive(), directory / "base", packed, *_ACCESS],
        capture_output=True,
        text=True,
        timeout=_BUILDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"debootstrap: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return packed
