"""Errors in a user's module, in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pnode_dist.config.registry import resolve
from pnode_dist.config.user_code import show_tracebacks, user_code
from pnode_dist.errors import ConfigurationError
from tests.unit.config.own_problems import written


@pytest.fixture(autouse=True)
def _without_tracebacks() -> Iterator[None]:
    yield
    show_tracebacks(False)


def complaint(directory: Path, name: str = "mine.py:Mine") -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve(name, directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_error_is_named_with_file_and_line(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "\n\nraise RuntimeError('two\\nlines')\n")

    assert complaint(tmp_path) == (
        f"{file}:3: RuntimeError: two lines (mine.py cannot be imported; --traceback shows the calls)"
    )


def test_an_error_without_a_text_has_no_colon_at_its_end(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "raise KeyError\n")

    assert complaint(tmp_path).startswith(f"{file}:1: KeyError (mine.py cannot be imported")


def test_a_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "x = 1\ny = = 2\n")

    assert complaint(tmp_path) == f"{file}:2: SyntaxError: invalid syntax (mine.py cannot be imported)"


def test_an_error_in_a_module_beside_the_file_is_named_there(tmp_path: Path) -> None:
    written(tmp_path / "mine.py", "import module_beside_with_an_error\n")
    beside = written(tmp_path / "module_beside_with_an_error.py", "def f():\n    return 1 / 0\nf()\n")

    assert complaint(tmp_path).startswith(f"{beside}:2: ZeroDivisionError: division by zero (mine.py cannot be ")


def test_a_syntax_error_in_a_module_beside_the_file_is_named_there(tmp_path: Path) -> None:
    written(tmp_path / "mine.py", "import module_beside_with_wrong_syntax\n")
    beside = written(tmp_path / "module_beside_with_wrong_syntax.py", "def f(:\n")

    assert complaint(tmp_path).startswith(f"{beside}:1: SyntaxError: ")


def test_an_error_in_a_library_is_named_at_the_user_s_call(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "import json\n\njson.loads('{')\n")

    assert complaint(tmp_path).startswith(f"{file}:3: JSONDecodeError: ")


def test_a_module_that_is_missing_is_named_where_it_is_imported(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "import numpy\nimport no_such_module_anywhere\n")

    assert complaint(tmp_path).startswith(f"{file}:2: ModuleNotFoundError: No module named 'no_such_module_anywhere'")


@pytest.mark.parametrize(("text", "error"), [("1 / 0", ZeroDivisionError), ("x = = 1", SyntaxError)])
def test_the_whole_traceback_is_shown_when_asked_for(tmp_path: Path, text: str, error: type[Exception]) -> None:
    written(tmp_path / "mine.py", text)
    show_tracebacks()

    with pytest.raises(error):
        resolve("mine.py:Mine", tmp_path)


@pytest.mark.parametrize("error", [ConfigurationError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_error_of_the_user_s_code_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, user_code("here", Path("/nowhere/mine.py"), "Mine"):
        raise error
    assert caught.value is error


def test_an_error_of_no_file_of_the_user_s_has_the_given_name(tmp_path: Path) -> None:
    def inside_a_library() -> None:
        with user_code("while Mine is built", tmp_path / "mine.py", "Mine"):
            json.loads("{")

    # This test is a file that belongs to no library.
    with pytest.raises(ConfigurationError, match=rf"^{__file__}:\d+: JSONDecodeError: .*while Mine is built"):
        inside_a_library()
