"""Finding the problem that a configuration names."""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pnode_dist.config import registry
from pnode_dist.config.definition import ProblemDefinition
from pnode_dist.config.registry import installed, resolve
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.semilinear import BURGERS
from tests.unit.config.own_problems import FORECAST, PLAIN, written


def complaint(kind: str, directory: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve(kind, directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_built_in_problems_are_registered_under_their_names() -> None:
    assert {"burgers", "field", "flows", "images", "robertson"} <= set(installed())
    assert list(installed()) == sorted(installed())


def test_a_registered_name_gives_its_definition_without_a_file(tmp_path: Path) -> None:
    found = resolve("burgers", tmp_path)

    assert (found.kind, found.name, found.definition) == ("burgers", "burgers", BURGERS)
    assert (found.file, found.sha256) == (None, None)


def test_an_import_path_gives_the_object_of_the_module(tmp_path: Path) -> None:
    found = resolve("pnode_dist.problems.semilinear:BURGERS", tmp_path)

    assert (found.definition, found.name) == (BURGERS, "BURGERS")


def test_a_module_of_the_user_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "decay_on_the_path.py", FORECAST)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = resolve("decay_on_the_path:Decay", Path("/"))

    assert (found.kind, found.file) == ("decay_on_the_path:Decay", file)
    assert found.definition.description == "Learn a decay."


def test_a_file_is_relative_to_the_directory_and_kept_by_its_absolute_path(tmp_path: Path) -> None:
    file = written(tmp_path / "inside" / "mine.py", FORECAST)
    found = resolve("./mine.py:Decay", tmp_path / "inside")

    assert (found.kind, found.name, found.file) == (f"{file}:Decay", "Decay", file)
    assert found.sha256 == hashlib.sha256(FORECAST.encode()).hexdigest()
    assert resolve("../inside/mine.py:Decay", tmp_path / "inside").kind == found.kind
    assert resolve(found.kind, Path("/")).kind == found.kind


def test_a_file_is_imported_once(tmp_path: Path) -> None:
    written(tmp_path / "mine.py", FORECAST)
    first, second = (resolve("mine.py:Decay", tmp_path).definition.build for _ in range(2))

    assert first is second


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        written(tmp_path / folder / "mine.py", FORECAST.replace("Learn a decay.", f"The one in {folder}."))

    assert [resolve("mine.py:Decay", tmp_path / folder).definition.description for folder in ("a", "b")] == [
        "The one in a.",
        "The one in b.",
    ]


def test_a_file_that_cannot_be_imported_is_tried_again(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "1 / 0")
    assert "ZeroDivisionError" in complaint("mine.py:Decay", tmp_path)
    assert str(file) not in [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    file.write_text(FORECAST)

    assert resolve("mine.py:Decay", tmp_path).name == "Decay"


def test_an_entry_point_of_another_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "other_package_of_problems.py", FORECAST)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("decay", "other_package_of_problems:Decay", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    found = resolve("decay", Path("/"))

    assert (found.kind, found.file) == ("decay", file)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("burger", "unknown problem (did you mean burgers?): must be one of burgers, field, "),
        ("xyz", "unknown problem: must be one of burgers, "),
        ("mine.py", "mine.py must be followed by a colon and a class, such as ./mine.py:MyProblem"),
        ("mine.py:Decai", "mine.py has no Decai (did you mean Decay?)"),
        ("mine.py:", "'' after the colon must be the name of a class"),
        ("mine.py:a b", "'a b' after the colon must be the name of a class"),
        ("min.py:Decay", "min.py (did you mean mine.py?)"),
        ("nowhere/mine.py:Decay", "nowhere/mine.py"),
        ("notes/mine.txt:Decay", "mine.txt: must be a Python file, with the ending .py"),
        ("no.such.module:X", "there is no module no.such.module: must be installed or on PYTHONPATH"),
        ("json:JSONDecoder", "JSONDecoder is not a problem: must be a class derived from pnode_dist.ForecastProblem"),
        ("pnode_dist.problems.semilinear:BURGER", "pnode_dist.problems.semilinear has no BURGER"),
        ("mine.py:Half", "Half does not define load_data and build_right_hand_side, which it must"),
    ],
)
def test_a_problem_that_is_not_there_is_named_in_one_line(tmp_path: Path, kind: str, said: str) -> None:
    half = "class Half(ForecastProblem):\n    def build_partition(self): ..."
    written(tmp_path / "mine.py", f"{FORECAST}\n\n{half}\n")
    written(tmp_path / "notes" / "mine.txt", FORECAST)

    assert said in complaint(kind, tmp_path)


def test_an_object_that_is_a_definition_is_taken_as_it_is(tmp_path: Path) -> None:
    written(
        tmp_path / "mine.py",
        "from pnode_dist.problems.semilinear import BURGERS as GIVEN",
    )
    definition = resolve("mine.py:GIVEN", tmp_path).definition

    assert isinstance(definition, ProblemDefinition)
    assert definition is BURGERS


def test_a_plain_pydantic_class_is_a_problem_s_table(tmp_path: Path) -> None:
    written(tmp_path / "plain.py", PLAIN)

    assert set(resolve("plain.py:Plain", tmp_path).definition.run.model_fields) >= {"problem", "model", "evaluation"}


def test_only_problems_of_the_package_are_built_in() -> None:
    assert [registry.is_built_in(kind) for kind in ("burgers", "burger", "./mine.py:Burgers", 3)] == [True] + 3 * [
        False
    ]
