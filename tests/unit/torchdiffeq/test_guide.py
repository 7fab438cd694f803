"""The guide for torchdiffeq's users names every method and option, and its Python prints what is shown."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from pnode_dist.torchdiffeq.methods import METHODS, REFUSED
from pnode_dist.torchdiffeq.options import ADAPTIVE, FIXED
from tests.conftest import ROOT

GUIDE = (ROOT / "docs/guides/coming_from_torchdiffeq.md").read_text()


def table(heading: str) -> dict[str, list[str]]:
    """The names in the first column of a section's table, each with the other columns of its row."""
    section = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {name: rest for first, *rest in rows for name in re.findall(r"`(\w+)`", first)}


def test_the_table_of_methods_says_which_are_refused() -> None:
    methods = table("Methods")
    assert set(methods) == {*METHODS, *REFUSED}
    assert {name for name, (here,) in methods.items() if here.startswith("refused")} == set(REFUSED)


def test_the_table_of_options_says_which_methods_take_them() -> None:
    options = table("Options")
    assert {name for name, (methods, _) in options.items() if methods == "adaptive"} == set(ADAPTIVE)
    assert {name for name, (methods, _) in options.items() if methods == "given steps"} == set(FIXED)


def test_the_python_of_the_guide_prints_what_is_shown() -> None:
    names: dict[str, Any] = {}
    shown = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", GUIDE, re.DOTALL)
    assert len(shown) == GUIDE.count("```python") == 5
    for program, output in shown:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, names)
        assert printed.getvalue() == output
