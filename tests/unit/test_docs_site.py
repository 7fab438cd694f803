"""The site has every page in its navigation, every public name in its reference, and pages that agree with the code."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import pnode_dist
from pnode_dist import nn
from tests.conftest import ROOT

DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((DOCS / "mkdocs/mkdocs.yml").read_text())
# As launch/docs.sh installs them.
PINS = (ROOT / "launch/constraints.txt").read_text().lower()
REFERENCE = "".join((DOCS / f"reference/{page}.md").read_text() for page in ("api", "layers", "training"))


def module(name: str) -> Any:
    """A module of docs/mkdocs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"mkdocs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [page] if isinstance(page, str) else entries(page)


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(entries(SETTINGS["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_links_only_to_what_the_site_contains(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        assert re.match(r"https?:", link) or (page.parent / link).resolve().is_relative_to(DOCS), link


def test_the_written_pages_are_those_of_the_code() -> None:
    pages = module("reference_pages").pages()
    assert len(pages) == 13
    for path, text in pages.items():
        assert (DOCS / "reference" / path).read_text() == text.rstrip() + "\n", (
            f"docs/reference/{path} differs: run python docs/mkdocs/reference_pages.py"
        )


def test_the_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert len(shown) == len(set(shown))
    public = [f"pnode_dist.{name}" for name in pnode_dist.__all__ if name not in ("Trajectory", "__version__")]
    public += [f"pnode_dist.nn.{name}" for name in nn.__all__]
    assert set(public) <= set(shown)
    assert "`pnode_dist.Trajectory`" in REFERENCE


def test_titles_and_lists_of_a_docstring_become_paragraphs_and_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    # griffe is installed for the site alone.
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    laid_out = module("docstrings").laid_out
    assert laid_out("Solve.\n\nSteps\n    `t` holds\n    times.\n\n    Two: none.\n\nRaises.") == (
        "Solve.\n\n**Steps**\n\n`t` holds\ntimes.\n\nTwo: none.\n\nRaises."
    )
    assert laid_out("One of\n- `a`: first,\n  longer\n- `b`") == "One of\n\n- `a`: first,\n  longer\n- `b`"
    for docstring in ("One line.", "Two\nlines.", "A list:\n\n- a\n- b"):
        assert laid_out(docstring) == docstring


def test_the_readme_is_an_entrance() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_pictures_of_the_documents_exist_and_each_is_shown() -> None:
    shown = set()
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for path in re.findall(r"!\[[^\]]+\]\((.*?)\)", page.read_text()):
            picture = (page.parent / path).resolve()
            assert picture.stat().st_size > 10_000
            shown.add(picture)
    assert shown == set((DOCS / "images").iterdir())


def test_files_of_the_root_are_put_into_their_pages() -> None:
    put_in = module("included_files").on_page_markdown
    for page, name in (("contributing", "CONTRIBUTING.md"), ("changelog", "CHANGELOG.md")):
        text = put_in((DOCS / f"{page}.md").read_text())
        assert text.startswith((ROOT / name).read_text()[:10])
        for link in re.findall(r"\]\(([^)\s#:]+\.md)", text):
            assert (DOCS / link).exists(), link


def test_nothing_of_the_site_comes_from_elsewhere_and_dead_links_are_errors() -> None:
    assert SETTINGS["theme"]["font"] is False
    assert not {"extra_javascript", "repo_url"} & set(SETTINGS)
    # The theme would fetch the program that draws these.
    assert not any("```mermaid" in page.read_text() for page in DOCS.rglob("*.md"))
    assert set(SETTINGS["validation"]["links"].values()) == {"warn"}
    assert "build --strict" in (ROOT / "launch/docs.sh").read_text()


def test_the_programs_of_the_site_are_pinned() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    for requirement in extra:
        assert re.search(rf"^{re.split(r'[^a-z-]', requirement)[0]}==", PINS, re.MULTILINE), requirement
