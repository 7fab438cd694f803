"""launch/build_wheels.sh and launch/matrix.sh: what they build and run, and what they refuse."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from tests.conftest import PATIENCE, ROOT
from tests.unit.launch_scripts import run_copy, stand_in

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
DECLARATION = """
[project]
classifiers = [
    "Programming Language :: Python :: {python}",
]
dependencies = [
    "torch>=2.6,<2.16",
]
"""


@pytest.mark.parametrize("script", ["build_wheels.sh", "matrix.sh"])
def test_help_is_the_text_at_the_top_of_a_script(script: str) -> None:
    path = ROOT / "launch" / script
    done = subprocess.run([str(path), "--help"], capture_output=True, text=True, check=True)
    comments = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()[1:])
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in comments]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("build_wheels.sh", ["dist"], "unknown argument 'dist' (known: --python PYTHON, --output DIRECTORY, --help)"),
        ("build_wheels.sh", ["--output"], "--output needs a value"),
        ("build_wheels.sh", ["--python", "/bin/false"], "--python /bin/false: is not Python 3.11 or newer"),
        ("matrix.sh", ["--fast"], "unknown option '--fast' (known: --directory, --help)"),
        ("matrix.sh", ["--directory"], "--directory needs a value"),
        *(
            (
                "matrix.sh",
                [row],
                f"'{row}': must be PYTHON:TORCH, a Python of 3.11 3.12 3.13 and lowest, newest or pinned",
            )
            for row in ("3.10:pinned", "3.11:2.6", "3.11")
        ),
    ],
)
def test_wrong_usage_gets_one_line(script: str, arguments: list[str], message: str) -> None:
    done = subprocess.run([str(ROOT / "launch" / script), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{script}: {message}\n")


def test_the_lowest_declared_python_is_the_lowest_that_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert project["requires-python"] == f">={declared[0]}"


def test_a_matrix_without_any_declared_python_says_so_and_fails(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(DECLARATION.format(python="3.99"))
    done = run_copy(tmp_path, "matrix.sh", "3.99:pinned", HOME=str(tmp_path), PYENV_ROOT=str(tmp_path))
    assert done.returncode == 1
    assert re.search(r"^3\.99 +pinned +not run: no python3\.99 on the PATH, of pyenv or of uv$", done.stdout, re.M)


def test_a_row_of_the_matrix_adds_up_its_parts_and_names_its_failure(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "pyproject.toml").write_text(DECLARATION.format(python=THIS))
    (checkout / "launch" / "constraints.txt").write_text("sympy==1.14.0\ntorch==2.13.0\n")
    stand_in(checkout / "launch", "bootstrap.sh", 'cat "${0%bootstrap.sh}constraints.txt"')
    summaries = (
        "= 3 passed, 2 skipped, 4 deselected in 1.50s =",
        "= 1 failed, 20 passed, 1 error in 61.00s (0:01:01) =",
    )
    stand_in(checkout / "launch", "test.sh", f"printf '%s\\n' '{summaries[0]}' '{summaries[1]}'; exit 7")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "All"]):
        subprocess.run([*git, *arguments], check=True)
    done = run_copy(checkout, "matrix.sh", f"{THIS}:lowest")
    assert done.returncode == 1, done.stderr
    assert re.search(rf"^{THIS} +lowest +23 +2 +2 +\d+  FAILED \(7\)$", done.stdout, re.MULTILINE), done.stdout
    log = (checkout / "build/matrix" / f"{THIS}-lowest.log").read_text()
    assert log.startswith("torch==2.6\n")


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_the_wheels_work_in_an_environment_elsewhere_without_a_compiler(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = [ROOT / "launch/build_wheels.sh", "--python", sys.executable, "--output", wheels]
    subprocess.run(build, check=True, timeout=2400)
    assert sorted(wheel.name.partition("-")[0] for wheel in wheels.iterdir()) == ["petsc", "petsc4py"]
    assert not [wheel for wheel in wheels.iterdir() if "manylinux" not in wheel.name]

    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env/bin"
    only = {"PATH": str(programs), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PIP_NO_CACHE_DIR": "1"}
    options = {name: value for name, value in os.environ.items() if name in ("PIP_FIND_LINKS", "PIP_CERT")}
    install = [programs / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--find-links", wheels]
    constraints = ("--constraint", ROOT / "launch/constraints.txt")
    packages = ("petsc", "petsc4py", "mpich", "mpi4py")
    subprocess.run([*install, *constraints, *packages], check=True, timeout=PATIENCE, env={**only, **options})
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    assert "\nPCC = mpicc\n" in (site / "petsc/lib/petsc/conf/petscvariables").read_text()
    assert "PETSC_DIR =\n" in (site / "petsc4py/lib/petsc.cfg").read_text()
    (site / "others.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    program = "import petsc4py, pnode_dist.cli.main as m; print(petsc4py.__file__); m.main(['doctor'])"
    ranks = [programs / "mpiexec", "-n", "2", programs / "python", "-c", program]
    done = subprocess.run(ranks, env=only, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(str(site / "petsc4py/__init__.py")) == 2
