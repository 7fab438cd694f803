"""What the README shows is what happens."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pnode_dist.bench import BENCHMARKS, CONFIGURED
from pnode_dist.bench.methods import run as methods
from pnode_dist.bench.methods.accuracy import tell
from pnode_dist.cli.main import main
from pnode_dist.config.tables import TrainingConfig
from pnode_dist.train.optimiser import optimiser_of, schedule_of
from tests.conftest import ROOT
from tests.in_short import SMALL
from tests.unit.test_examples import LOOP_COMMAND

Run = Callable[..., subprocess.CompletedProcess[str]]
README = (ROOT / "README.md").read_text()
PARTITIONED, PLAIN, IMPLICIT, FITTED = MARKS = (
    "GridPartition(",
    "class Oscillator(",
    "parts = SplitFunction(",
    "fit(",
)
EXAMPLES = {
    mark: block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) for mark in MARKS if mark in block
}
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
# Run here; the others are run by .ci/run or the demonstration itself.
QUICK = [
    "pnode-dist methods",
    "pnode-dist doctor",
    "pnode-dist config init burgers",
    "pnode-dist config reference burgers",
    "pnode-dist config schema burgers",
    "pnode-dist completion bash",
]


def test_every_example_is_run_by_a_test() -> None:
    assert set(EXAMPLES) == set(MARKS)
    assert len(set(EXAMPLES.values())) == README.count("```python") == len(MARKS)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_the_partitioned_example_runs_at_any_number_of_ranks_to_the_same_loss(
    mpirun: Run, tmp_path: Path, ranks: int
) -> None:
    total = "total = mesh.sum(loss.double()).item()"
    script = EXAMPLES[PARTITIONED].replace(
        "if mesh.is_root:\n        print(", f"{total}\n    if mesh.is_root:\n        print("
    )
    (tmp_path / "reaction.py").write_text(script.replace('"loss share of rank 0:", loss.item()', "total"))
    done = mpirun(ranks, "python", "reaction.py")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.97334791, rel=1e-6)


def test_the_first_example_spills_and_counts(mpirun: Run, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLES[PLAIN])
    done = mpirun(1, "python", "example.py")
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"(\w+)=(\d+)", done.stdout))
    assert counts["forward_steps"] == counts["adjoint_steps"] == "100"
    assert int(counts["bytes_written"]) > 0


def test_the_implicit_example_solves_its_equations(mpirun: Run, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLES[IMPLICIT])
    done = mpirun(1, "python", "example.py")
    assert done.returncode == 0, done.stderr
    counts = dict(re.findall(r"(\w+)=(\d+)", done.stdout))
    assert counts["forward_steps"] == counts["adjoint_steps"] == "20"
    assert int(counts["adjoint_linear_iterations"]) >= 20


def test_the_fit_example_calls_back_and_evaluates_better_than_persistence(mpirun: Run, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "example.py").write_text(EXAMPLES[FITTED])
    done = mpirun(1, "python", "example.py")
    assert done.returncode == 0, done.stderr
    *validations, row = [line for line in done.stdout.splitlines() if line.startswith(("epoch 4 ", "epoch 8 ", "{"))]
    assert [line.split()[1] for line in validations] == ["4", "8"]
    errors = ast.literal_eval(row)
    assert 0 < errors["model"] < errors["persistence"]


def test_the_optimiser_and_schedule_of_the_toml_example_are_made_as_it_says() -> None:
    (toml,) = [block for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if "optimiser =" in block]
    training = TrainingConfig.model_validate(tomllib.loads(toml)["training"])
    optimiser = optimiser_of(training, torch.nn.Linear(1, 1))
    schedule = schedule_of(training, optimiser)
    assert isinstance(optimiser, torch.optim.NAdam)
    assert tuple(optimiser.param_groups[0]["betas"]) == (0.9, 0.99)
    optimiser.step()
    assert isinstance(schedule, torch.optim.lr_scheduler.ExponentialLR)
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(0.9 * training.learning_rate)]


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(mpirun: Run, command: str) -> None:
    assert command in COMMANDS
    done = mpirun(1, *command.split())
    assert done.returncode == 0, done.stderr


def test_the_benchmark_s_checks_hold_what_they_say(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "pnode-dist bench gradient" in COMMANDS
    # Its times are not looked at here.
    monkeypatch.setattr("pnode_dist.bench.gradient._REPEATS", 1)
    assert main(["bench", "gradient", "--json"]) == 0
    checks = json.loads(capfd.readouterr().out)["checks"]
    assert all(set(check) == {"name", "value", "target", "at_least", "holds"} for check in checks)
    exact = [check for check in checks if "error" in check["name"] or "difference" in check["name"]]
    assert exact
    assert all(check["holds"] for check in exact)


def test_the_comparison_of_methods_runs_with_a_small_network(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "pnode-dist bench methods" in COMMANDS
    small = methods.flow((2,), samples=8, dimension=2, hidden=(8, 8), flows=1)
    monkeypatch.setattr(methods, "SHORT", (small,))
    monkeypatch.setattr(methods, "TABLES", {"dopri5": methods.TABLES["dopri5"]})
    monkeypatch.setattr(methods, "ROUNDS", 1)
    monkeypatch.setattr(methods, "SECONDS", 0.0)
    monkeypatch.setattr(methods, "MANY_STEPS", 4)
    monkeypatch.setattr(methods, "tell", lambda ways: tell(ways, iterations=2))
    assert main(["bench", "methods", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    naive = [row for row in found["rows"] if row["method"] == "NODE-naive"]
    assert [(row["solver"], row["gradient error"], row["x naive"]) for row in naive] == [("dopri5", 0, 1)]
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["largest gradient error of a reverse-accurate method"]["holds"]
    assert checks["counts that differ from the theory"]["holds"]


def in_full(command: str) -> str:
    """A command of .ci/run as the README shows it: there trainings are of few epochs, and benchmarks small."""
    command = command.replace("python tests/in_short.py ", "pnode-dist ")
    return re.sub(r"( --set training.epochs=\d+)$", "", command)


def test_every_other_command_is_run_in_short_for_every_change() -> None:
    demo, ci = (ROOT / "launch/demo.sh").read_text(), (ROOT / ".ci/run").read_text()
    starts = ("pnode-dist ", "launch/", "python tests/in_short.py ")
    in_ci = {in_full(line) for line in ci.splitlines() if line.startswith(starts)}
    in_demo = {
        line.removesuffix(' --overwrite "$@"') for line in demo.splitlines() if line.startswith("launch/mpirun.sh ")
    }
    # Tests above, and of the examples.
    here = {*QUICK, "pnode-dist bench gradient", "pnode-dist bench methods", LOOP_COMMAND}
    assert {"launch/demo.sh", "launch/test.sh"} <= in_ci
    assert set(COMMANDS) == here | in_ci | in_demo


def test_every_command_is_run_in_full_at_night() -> None:
    listed = subprocess.run([ROOT / "launch/nightly.sh", "--list"], capture_output=True, text=True, check=True)
    at_night = [line.removesuffix(" --overwrite") for line in listed.stdout.splitlines()]
    assert at_night[:2] == ["launch/test.sh --nightly", "launch/matrix.sh"]
    assert at_night[2:] == [command for command in COMMANDS if command != "launch/test.sh"]


def test_every_other_benchmark_has_a_short_form() -> None:
    assert set(SMALL) == set(BENCHMARKS) - {"gradient", "methods", *CONFIGURED}


def test_figures_and_pictures_that_the_readme_shows_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
