"""Every path, name and link in the documents exists, and their map of the package is the one that is checked."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

DOCUMENTS = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
_IN_ROOT = ("pnode_dist", "tests", "launch", "docs", "examples", "slurm", "docker", ".ci")
_WITH_ROOT = re.compile(r"(?<![\w/.-])(?:" + "|".join(map(re.escape, _IN_ROOT)) + r")/[\w./*-]*[\w/*]")
_CODE = re.compile(r"`([^`\n]+)`")
# A path, or with a colon a name in that file, as `ode/solve.py:Solve.advance`.
_PATH = re.compile(r"(?P<path>[\w.*-]+(?:/[\w.*-]+)*/?)(?::(?P<name>[A-Za-z_][\w.]*))?")
_SUFFIXES = (".py", ".md", ".toml", ".sh", ".cff", ".yaml", ".html", ".sbatch")
_DOTTED = re.compile(r"(?<![\w./-])pnode_dist(?:\.[A-Za-z_]\w*)+(?![\w/-])")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# Files and folders of a run, of the site, and of programs that a reader writes.
_ELSEWHERE = (
    *("./", "runs/", "site/", "snapshots/", "tensorboard/", "config.toml", "report.html"),
    *("reaction.py", "my_package/", "my.toml", "mine.py"),
)


def missing(text: str, directory: Path) -> list[str]:
    """The paths, dotted names and relative links in `text` that lead nowhere, for a document in `directory`."""
    return sorted({*_missing_paths(text, directory), *_missing_names(text), *_missing_links(text, directory)})


def _missing_paths(text: str, directory: Path) -> Iterator[str]:
    for found in _WITH_ROOT.findall(text):
        if not _exists(found, ROOT):
            yield found
    for code in _CODE.findall(_FENCE.sub("", text)):
        match = _PATH.fullmatch(code)
        if match is None or not ("/" in match["path"] or match["path"].endswith(_SUFFIXES)):
            continue
        if code.startswith(_ELSEWHERE) and not (directory / code).exists():
            continue
        places = [place for place in (directory, ROOT, ROOT / "pnode_dist") if _exists(match["path"], place)]
        if not places or (match["name"] and not _defines(places[0] / match["path"], match["name"])):
            yield code


def _exists(path: str, place: Path) -> bool:
    return any(place.glob(path.rstrip("/"))) and (not path.endswith("/") or (place / path).is_dir())


def _defines(file: Path, name: str) -> bool:
    """Whether a Python file defines a function, class, method or variable of this name, without importing it."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [statement for statement in body if part in _names(statement)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def _names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
            return [statement.name]
        case ast.Assign():
            return [node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _missing_names(text: str) -> Iterator[str]:
    for name in _DOTTED.findall(text):
        if not (_is_object(name) or name in PROJECT["project"]["entry-points"]):
            yield name


def _is_object(name: str) -> bool:
    """Whether a dotted name is a module, or an object in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def _missing_links(text: str, directory: Path) -> Iterator[str]:
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = directory / path
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text() if path else text)):
            yield link


def _anchors(text: str) -> list[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.filterwarnings("ignore:pnode_dist.* is deprecated")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_name_and_link_in_a_document_exists(document: Path) -> None:
    assert missing(document.read_text(), document.parent) == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("`ode/solver_loop.py`", "`ode/solve.py`"),
        ("see launch/tests.sh", "see launch/test.sh"),
        ("`ode/solve.py:Solve.advances`", "`ode/solve.py:Solve.advance`"),
        ("`checkpointing/plan.py:beast`", "`checkpointing/plan.py:best`"),
        ("`pnode_dist.ode.odeint.NeuralODF`", "`pnode_dist.ode.odeint.NeuralODE`"),
        ("`pnode_dist.odd`", "`pnode_dist.ode`"),
        ("`tests/mpi/test_convolution*.py`", "`tests/mpi/test_conv*.py`"),
        ("`launch/test.sh/`", "`launch/configs/`"),
        ("[here](docs/architect.md)", "[here](docs/architecture.md)"),
        ("[here](docs/architecture.md#the-chambers)", "[here](docs/architecture.md#the-rooms)"),
        ("## One\n[here](#two)", "## One\n[here](#one)"),
    ],
)
def test_a_name_that_has_rotted_is_found(wrong: str, right: str) -> None:
    assert len(missing(wrong, ROOT)) == 1
    assert missing(right, ROOT) == []


def test_the_rooms_of_the_document_are_those_of_the_contract_in_order() -> None:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = [sorted(layer.split(" | ")) for layer in reversed(layers)]
    section = (ROOT / "docs/architecture.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    (diagram,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    drawn = [sorted(re.findall(r"\w+", line.partition("|")[0])) for line in diagram.splitlines() if line.strip()]
    assert drawn[::-1] == rooms
    table = [name for row in re.findall(r"^\|(.*?)\|", section, re.MULTILINE) for name in re.findall(r"`(\w+)", row)]
    assert sorted(table) == sorted(name for layer in rooms for name in layer)


def test_contributing_and_architecture_are_short_enough_to_be_read() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 220
    assert len((ROOT / "docs/architecture.md").read_text().splitlines()) <= 200
