"""The programs in the guides for torch's and PETSc's own tools run as they stand."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

GUIDES = [ROOT / "docs" / "guides" / f"{name}.md" for name in ("torch_tools", "petsc_users")]
PROGRAMS = [
    # torch's tools take seconds to load.
    pytest.param(block, id=f"{guide.stem} {number}", marks=[pytest.mark.slow] * (guide.stem == "torch_tools"))
    for guide in GUIDES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL), 1)
]


def test_both_guides_have_programs() -> None:
    assert len(PROGRAMS) == 8


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_a_guide_runs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    exec(compile(program, "guide.py", "exec"), {"__name__": "__main__"})


@pytest.mark.nightly
@pytest.mark.parametrize("program", [*PROGRAMS[:4], PROGRAMS[5]])
def test_a_program_of_a_guide_runs_on_two_ranks(
    program: str, tmp_path: Path, mpirun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "guide.py").write_text(program)
    ended = mpirun(2, "python", "guide.py")
    assert ended.returncode == 0, ended.stderr
