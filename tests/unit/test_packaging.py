"""The recipes for Spack and conda name the version and the dependencies of pyproject.toml."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import venv
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SPACK = ROOT / "packaging/spack/spack_repo/pnode_dist"
CONDA = ROOT / "packaging/conda/recipe.yaml"
# Names that differ from those of PyPI.
CONDA_NAMES = {"isal": "python-isal", "matplotlib": "matplotlib-base", "torch": "pytorch"}
LINTER = "py-rattler-build==0.73.0"

Ranges = dict[str, str]


def ranges(requirements: list[str]) -> Ranges:
    """The range of versions of each package, as `>=2.7,<3`."""
    split = [re.fullmatch(r"([\w-]+)(>=[\d.]+(?:,<[\d.]+)?)", requirement) for requirement in requirements]
    return {match[1]: match[2] for match in split if match is not None}


def needed() -> Ranges:
    project = PROJECT["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["plot"]]
    found = ranges(requirements)
    assert len(found) == len(requirements)
    return {**found, "python": project["requires-python"]}


def builder() -> Ranges:
    return ranges(PROJECT["build-system"]["requires"])


def spack_range(version_range: str) -> str:
    """`>=2.7,<3` as Spack writes it, whose upper end belongs to the range."""
    lower, _, upper = version_range.removeprefix(">=").partition(",<")
    *front, last = upper.split(".") if upper else [""]
    return f"{lower}:{'.'.join([*front, str(int(last) - 1)]) if upper else ''}"


def test_a_range_of_pip_is_written_as_spack_s() -> None:
    assert spack_range(">=3.22,<3.28") == "3.22:3.27"
    assert spack_range(">=2.7,<3") == "2.7:2"
    assert spack_range(">=13") == "13:"


class Recipe:
    """The directives of a package.py of Spack, which is executed without Spack."""

    def __init__(self, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions: list[str] = []
        self.dependencies: dict[str, str | tuple[str, ...]] = {}

        def version(number: str, **_: Any) -> None:
            self.versions.append(number)

        def depends_on(spec: str, *, type: str | tuple[str, ...], when: str = "") -> None:
            self.dependencies[spec] = type

        directives: dict[str, Any] = {"version": version, "depends_on": depends_on}
        directives |= {"license": lambda *_, **__: None, "variant": lambda *_, **__: None}
        directives["when"] = lambda *_: nullcontext()
        name = "".join(part.capitalize() for part in package.split("_"))
        for module, names in {
            "spack.package": directives,
            "spack_repo.builtin.build_systems.python": {"PythonPackage": object},
            f"spack_repo.builtin.packages.{package}.package": {name: object},
        }.items():
            parts = module.split(".")
            for length in range(1, len(parts) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(parts[length - 1]))
            vars(sys.modules[module]).update(names)
        path = SPACK / "packages" / package / "package.py"
        variables: dict[str, Any] = {"__file__": str(path), "__name__": package}
        exec(compile(path.read_text(), path, "exec"), variables)
        self.package: Any = variables[name]


def test_spack_s_recipe_has_the_version_and_the_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("py_pnode_dist", monkeypatch)
    assert recipe.versions == [PROJECT["project"]["version"]]
    run = {f"py-{name}@{spack_range(versions)}" for name, versions in needed().items() if name != "python"}
    run |= {f"python@{spack_range(needed()['python'])}"}
    build = {f"py-{name}@{spack_range(versions)}" for name, versions in builder().items()}
    of_petsc = "petsc+mpi~complex"
    assert set(recipe.dependencies) == run | build | {of_petsc}
    assert {spec for spec, kind in recipe.dependencies.items() if kind == ("build", "run")} == run
    assert {spec for spec, kind in recipe.dependencies.items() if kind == "build"} == build


def test_spack_s_recipe_builds_the_checkout_that_it_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recipe("py_pnode_dist", monkeypatch).package.git == ROOT.as_uri()
    assert yaml.safe_load((SPACK / "repo.yaml").read_text())["repo"]["namespace"] == SPACK.name


@pytest.mark.parametrize("package", ["isal", "shtab"])
def test_releases_added_to_spack_s_own_are_those_of_the_constraints(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = re.search(rf"^{package}==(.*)$", (ROOT / "launch/constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert Recipe(f"py_{package}", monkeypatch).versions == [pinned[1]]


def in_conda(found: Ranges) -> set[str]:
    return {f"{CONDA_NAMES.get(name, name)} {versions}" for name, versions in found.items()}


def test_conda_s_recipe_has_the_version_and_the_dependencies() -> None:
    recipe = yaml.safe_load(CONDA.read_text())
    assert recipe["context"]["version"] == PROJECT["project"]["version"]
    assert set(recipe["requirements"]["run"]) == in_conda(needed()) | {"petsc * *real*"}
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert set(recipe["requirements"]["host"]) == in_conda(builder()) | {f"python {lowest}.*", "pip"}
    (script,) = PROJECT["project"]["scripts"].items()
    assert recipe["build"]["python"]["entry_points"] == [" = ".join(script)]
    assert (CONDA.parent / recipe["source"]["path"]).resolve() == ROOT


@pytest.mark.nightly
def test_rattler_build_reads_conda_s_recipe(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", LINTER], check=True)
    program = """
import json, sys
from rattler_build import Stage0Recipe
(rendered,) = Stage0Recipe.from_file(sys.argv[1]).render()
recipe = rendered.recipe
print(json.dumps([recipe.package.name, recipe.package.version, [str(need) for need in recipe.requirements.run]]))
"""
    done = subprocess.run([python, "-c", program, CONDA], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load(CONDA.read_text())
    assert json.loads(done.stdout) == ["pnode-dist", PROJECT["project"]["version"], recipe["requirements"]["run"]]
