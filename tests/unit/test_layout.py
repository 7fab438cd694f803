"""The package has small files in rooms, and the tests have names that fit a line."""

from __future__ import annotations

import ast
from pathlib import Path

import pnode_dist
from tests.conftest import ROOT

PACKAGE = Path(pnode_dist.__file__).parent
MOST_LINES = 450
LONGEST_NAME = 80


def test_no_file_of_the_package_is_long() -> None:
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(lengths) > 100
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_the_root_of_the_package_holds_errors_and_rooms_alone() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "errors.py", "py.typed"}


def test_names_of_tests_have_at_most_80_characters() -> None:
    names = [
        (path.relative_to(ROOT), node.name)
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 1000
    long = {str(path): name for path, name in names if len(name) > LONGEST_NAME}
    assert long == {}
