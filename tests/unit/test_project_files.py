"""The files of the root agree with the package: citation, hooks before a commit, and the change log."""

from __future__ import annotations

import re
import tomllib

import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_names_this_version_and_the_paper_of_the_method() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == [{"name": "The pnode_dist contributors"}]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert [author["family-names"] for author in paper["authors"]] == ["Zhang", "Zhao"]
    (identifier,) = paper["identifiers"]
    assert identifier["value"].replace(":", " ") in (ROOT / "README.md").read_text()


def test_the_hooks_before_a_commit_are_the_checks_of_the_test_script() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    checks = re.findall(
        r'^    part "[^"]+" ((?:ruff|mypy|lint-imports).*)$', (ROOT / "launch/test.sh").read_text(), re.M
    )
    assert len(checks) == 4
    assert hooks == checks
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in repository["hooks"])


def test_the_change_log_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert releases[0].startswith("[")
    released = releases[1:] if releases[0] == "[Unreleased]" else releases
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - (unreleased|\d{4}-\d\d-\d\d)", release) for release in released)
    groups = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
