"""The Python and the TOML that the documents show work as shown."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from pnode_dist.config.registry import resolve
from pnode_dist.config.tables import TrainingConfig
from pnode_dist.train.optimiser import optimiser_of, schedule_of
from tests.conftest import ROOT
from tests.documents import Block, all_blocks, blocks_of

pytestmark = pytest.mark.slow
Run = Callable[..., subprocess.CompletedProcess[str]]
BLOCKS = all_blocks()
PROGRAMS = {
    page: blocks
    for page in dict.fromkeys(block.page for block in BLOCKS)
    if (blocks := [block for block in BLOCKS if block.page == page and block.language == "python" and block.as_it_is])
}
TABLES = [block for block in BLOCKS if block.language == "toml"]
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")


def printed_by(blocks: list[Block]) -> list[str]:
    """Return the output of each block of a page. The blocks share their names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for block in blocks:
        # Errors name the page and its line.
        program = compile("\n" * (block.line) + block.text, block.page, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(program, names)
        outputs.append(output.getvalue())
    return outputs


def differing(printed: str, shown: str) -> str:
    """Empty if the texts agree, decimal fractions to a thousandth."""
    if _NUMBER.sub("#", printed) != _NUMBER.sub("#", shown):
        return f"printed {printed!r}, shown {shown!r}"
    for one, other in zip(_NUMBER.findall(printed), _NUMBER.findall(shown), strict=True):
        if float(one) != pytest.approx(float(other), rel=1e-3, abs=1e-12):
            return f"printed {one}, shown {other}"
    return ""


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_python_of_a_page_runs_and_prints_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for block, printed in zip(PROGRAMS[page], printed_by(PROGRAMS[page]), strict=True):
        if block.output is not None:
            assert differing(printed, block.output) == "", f"{page}:{block.line}"


def test_a_wrong_output_is_found() -> None:
    shown = "Text.\n\n```python\nx = 0.5\nprint(x, 3)\n```\n\n```text\n0.5 3\n```\n\n```python\nprint(2 * x)\n```\n"
    blocks = blocks_of(shown)
    assert [block.output for block in blocks] == ["0.5 3\n", None]
    assert printed_by(blocks) == ["0.5 3\n", "1.0\n"]
    for wrong in ("0.51 3\n", "0.5 4\n", "0.5\n", ""):
        assert differing("0.5 3\n", wrong) != ""
    assert differing("0.5001 3\n", "0.5 3\n") == ""


def program_with(page: str, text: str) -> str:
    (found,) = [block.text for block in PROGRAMS[page] if text in block.text]
    return found


def meaning(program: str) -> str:
    """A program without its layout, which is narrower on the site."""
    return ast.dump(ast.parse(program))


def test_readme_and_tutorial_show_the_same_partitioned_example() -> None:
    readme, tutorial = (
        program_with(page, "class ReactionDiffusion(") for page in ("README.md", "docs/tutorials/four_ranks.md")
    )
    assert meaning(readme) == meaning(tutorial)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_the_partitioned_example_has_the_same_loss_on_any_number_of_ranks(
    mpirun: Run, tmp_path: Path, ranks: int
) -> None:
    total = "total = mesh.sum(loss.double()).item()"
    tutorial = (ROOT / "docs/tutorials/four_ranks.md").read_text()
    assert f"```text\n{total}\n```" in tutorial
    script = program_with("README.md", "GridPartition(").replace(
        "if mesh.is_root:\n        print(", f"{total}\n    if mesh.is_root:\n        print("
    )
    (tmp_path / "reaction.py").write_text(script.replace('"loss share of rank 0:", loss.item()', "total"))
    done = mpirun(ranks, "python", "reaction.py")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.97334791, rel=1e-6)
    assert "It is 0.97334791 on" in tutorial


def test_the_problem_trained_from_python_is_better_than_persistence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCKS if block.language == "python" and "fit(None" in block.text]
    assert block.page == "docs/tutorials/own_problem.md"
    (printed,) = printed_by([block])
    *validations, row = [line for line in printed.splitlines() if line.startswith(("epoch 4 ", "epoch 8 ", "{"))]
    assert [line.split()[1] for line in validations] == ["4", "8"]
    errors = ast.literal_eval(row)
    assert 0 < errors["model"] < errors["persistence"]


def test_the_tutorial_shows_the_files_of_the_example() -> None:
    page, directory = "docs/tutorials/own_problem.md", ROOT / "examples/own_problem"
    assert meaning(program_with(page, "ForecastProblem")) == meaning((directory / "mine.py").read_text())
    assert (directory / "mine.toml").read_text() in [block.text for block in TABLES if block.page == page]


@pytest.mark.parametrize("block", TABLES, ids=lambda block: f"{block.page}:{block.line}")
def test_the_tables_of_a_page_are_those_of_a_configuration(block: Block) -> None:
    tables = tomllib.loads(block.text)
    kind = tables.get("problem", {}).get("type", "field")
    run = resolve(kind, ROOT / "examples/own_problem").definition.run
    for name, table in tables.items():
        model = run.model_fields[name].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        model.model_validate(table)


def test_the_optimiser_and_schedule_of_the_toml_example_are_made_as_it_says() -> None:
    (block,) = [block for block in TABLES if "optimiser =" in block.text]
    training = TrainingConfig.model_validate(tomllib.loads(block.text)["training"])
    optimiser = optimiser_of(training, torch.nn.Linear(1, 1))
    schedule = schedule_of(training, optimiser)
    assert isinstance(optimiser, torch.optim.NAdam)
    assert tuple(optimiser.param_groups[0]["betas"]) == (0.9, 0.99)
    optimiser.step()
    assert isinstance(schedule, torch.optim.lr_scheduler.ExponentialLR)
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.9 * training.learning_rate)]
