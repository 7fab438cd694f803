"""On Debian 13 the packages of PETSc, MPI and torch suffice: nothing is compiled, and nothing is fetched elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pnode_dist.ode.methods import ADJOINT_FLOORS, METHODS
from tests.cluster import namespaces
from tests.cluster.conftest import install
from tests.cluster.image import debian_archive
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]
RELEASE = "trixie"
_LONG, _SHORT = 3000.0, 600.0
# What a machine needs to reach its package archive.
_ACCESS = ("/etc/apt/apt.conf.d", "/usr/local/share/ca-certificates", "/etc/ssl/certs/ca-certificates.crt")
_MAKE = """
archive=$1 root=$2 release=$3
shift 3
debootstrap --variant=minbase "$release" "$root" "$archive"
for file; do if [ -e "$file" ]; then cp -r --parents "$file" "$root"; fi; done
echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/unsafe"
chroot "$root" apt-get -qy update
"""
_ENTER = """
root=$1
shift
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
exec chroot "$root" env --ignore-environment --chdir=/root "$@"
"""
# What the tests need besides pnode_dist: Debian's packages, and those that it lacks.
_TEST_PACKAGES = "python3-{h5netcdf,hypothesis,pytest,pytest-timeout,scipy,xarray}"
_OTHER_PACKAGES = "checkpoint-schedules pytest-mpi torchdiffeq"
_TESTS = f"""
apt-get install -y --no-install-recommends {_TEST_PACKAGES} >apt.log
pnode/bin/pip install --quiet --no-deps {_OTHER_PACKAGES}
export PATH=$PWD/pnode/bin:$PATH PYTHONPATH=$(echo /usr/lib/petscdir/*/*-real/lib/python3/dist-packages)
cd checkout
eval "$(grep -E '^core(_at_ranks)?=' launch/test.sh)"
python -m pytest --quick -m "not mpi and not cluster" "${{core[@]}}"
mpiexec -n 2 python tests/mpi/run_rank.py --quick "${{core_at_ranks[@]}}"
"""
# Open MPI does not start as root, nor more ranks than cores, unless told to; without a network, its ranks warn.
_VARIABLES = (
    "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "DEBIAN_FRONTEND=noninteractive",
    "OMP_NUM_THREADS=1",
    "COLUMNS=160",
    "PIP_CERT=/etc/ssl/certs/ca-certificates.crt",
    "OMPI_ALLOW_RUN_AS_ROOT=1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
    "OMPI_MCA_btl=self,sm",
    "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe",
)


@dataclass(frozen=True)
class Debian:
    """A minimal Debian in a directory."""

    root: Path

    def run(self, script: str, timeout: float = _SHORT) -> subprocess.CompletedProcess[str]:
        """Run a script of bash as root in root's home, with name spaces of its own."""
        enter = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _ENTER, "sh", str(self.root))
        return subprocess.run(
            [*enter, *_VARIABLES, "bash", "-euc", script], capture_output=True, text=True, timeout=timeout, check=False
        )


def page_commands() -> list[str]:
    """The commands by which docs/guides/install.md installs on Debian's packages."""
    page = (ROOT / "docs" / "guides" / "install.md").read_text()
    (block,) = [text for text in re.findall(r"```console\n(.*?)```", page, re.DOTALL) if "apt-get install" in text]
    return [line.removeprefix("$ ").removeprefix("sudo ") for line in block.splitlines()]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    """A minimal Debian 13 with the wheel of this checkout in root's home."""
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    install(("debootstrap",), ("debootstrap",))
    directory = tmp_path_factory.mktemp("debian")
    root = directory / "root"
    try:
        made = subprocess.run(
            ["sh", "-euc", _MAKE, "sh", debian_archive(), str(root), RELEASE, *_ACCESS],
            capture_output=True,
            text=True,
            timeout=_LONG,
            check=False,
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(root / "root")]
        subprocess.run([*wheel, str(ROOT)], check=True, timeout=_SHORT)
        yield Debian(root)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_debian_s_packages_and_the_wheel_check_all_gradients_but_dirk_s(debian: Debian) -> None:
    done = debian.run("\n".join(page_commands()), timeout=_LONG)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = dict(re.findall(r"^│ (\w+) .*│ (verified|none|refused: needs PETSc 3\.26) +│", done.stdout, re.MULTILINE))
    assert rows == {
        name: "refused: needs PETSc 3.26" if method.family in ADJOINT_FLOORS else method.adjoint
        for name, method in METHODS.items()
    }
    assert re.search(r"^ranks: 2$", done.stdout, re.MULTILINE)

    # Without the variable that the page sets, the error names the directory.
    done = debian.run("pnode/bin/python -c 'import pnode_dist'")
    assert done.returncode == 1
    assert re.fullmatch(
        r"ImportError: pnode_dist needs petsc4py, which is in /usr/lib/petscdir/petsc3\.\d+/\S+, where Python does not "
        r"look: add this directory to PYTHONPATH, or install Debian's libpetsc-real-dev",
        done.stderr.splitlines()[-1],
    )


def test_the_quick_tests_pass_on_debian_s_packages(debian: Debian) -> None:
    installed = debian.run("\n".join(page_commands()[:-1]), timeout=_LONG)
    assert installed.returncode == 0, installed.stdout[-2000:] + installed.stderr[-4000:]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            copy = debian.root / "root" / "checkout" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
    done = debian.run(_TESTS, timeout=_LONG)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    summaries = re.findall(r"^=* ?(\d+ passed.*?) in .*$", done.stdout, re.MULTILINE)
    assert len(summaries) == 2
    print("serially: {}; on two ranks: {}".format(*summaries))
