"""`pnode-dist plan`: what a budget allows, as a table, as JSON and as a picture; and what a solve tells PETSc's log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pnode_dist.cli.main import main
from tests.conftest import PATIENCE
from tests.unit.problems.gray_scott.plain_gray_scott import config as gray_scott

Capture = pytest.CaptureFixture[str]
CANDIDATE_KEYS = {
    "name", "steps", "segment", "units", "level", "kept", "schedule", "ram", "disk", "forward_steps",
    "recomputed_steps", "disk_writes", "disk_reads", "ram_bytes", "disk_bytes", "seconds",
}  # fmt: skip
# A window of 2 intervals of 4 in steps of 1; a batch of 2 states of 10 x 13 points with 2 components in float32.
STEPS, CHECKPOINT = 8, 2 * 10 * 13 * 2 * 4


@pytest.fixture
def gray_scott_file(tmp_path: Path) -> Path:
    """A configuration whose data are computed, with a budget of 3 checkpoints in memory and 2 on disk."""
    path = tmp_path / "pattern.toml"
    trajectory = {"ram": 3 * CHECKPOINT, "disk": 2 * CHECKPOINT, "directory": str(tmp_path)}
    # Computing the data takes as long as the plan.
    shortest = {"problem": {"times": 3}, "evaluation": {"leads": (1, 2)}}
    solver = {"step_size": 1.0, "method": "heun"}
    path.write_text(gray_scott(solver=solver, trajectory=trajectory, run={"name": "pattern"}, **shortest).to_toml())
    return path


def run_json(capfd: Capture, *argv: Any) -> dict[str, Any]:
    code = main(["plan", *map(str, argv), "--json"])
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def complaint(capfd: Capture, *argv: Any) -> str:
    """The one line with which a command ends that cannot be carried out."""
    code = main(["plan", *map(str, argv)])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("pnode-dist: error: ")
    return line


def test_the_json_has_the_choice_all_candidates_and_the_costs(gray_scott_file: Path, capfd: Capture) -> None:
    result = run_json(capfd, gray_scott_file)
    assert result.keys() == {"chosen", "candidates", "slots", "costs"}
    assert result["slots"] == {
        "ram": 3,
        "disk": 2,
        "checkpoint_bytes": CHECKPOINT,
        "ram_bytes": 3 * CHECKPOINT,
    }
    names = [candidate["name"] for candidate in result["candidates"]]
    assert result["chosen"] in names
    # Several divisions between memory and disk may have one name.
    fastest = min(result["candidates"], key=lambda candidate: candidate["seconds"])
    assert fastest["name"] == result["chosen"]
    for candidate in result["candidates"]:
        assert candidate.keys() == CANDIDATE_KEYS
        assert (candidate["steps"], candidate["segment"]) == (STEPS, 1)
        assert candidate["recomputed_steps"] == candidate["forward_steps"] - STEPS
        assert candidate["ram_bytes"] <= 3 * CHECKPOINT
        assert candidate["disk_bytes"] <= 2 * CHECKPOINT
        assert candidate["seconds"] > 0
    assert {"revolve", "multistage"} <= {candidate["schedule"] for candidate in result["candidates"]}
    assert set(result["costs"]["levels"]) == {"graph", "stages"}
    # Two stages in float32, the type of the state and of the model.
    assert result["costs"]["levels"]["stages"]["bytes"] == 2 * CHECKPOINT
    for name in ("step", "copy", "write", "read"):
        assert result["costs"][name] > 0
    assert 0 <= result["costs"]["overlapped"] <= 1


def test_for_people_there_is_a_table_that_says_what_is_chosen(gray_scott_file: Path, capfd: Capture) -> None:
    assert main(["plan", str(gray_scott_file)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "a checkpoint written to disk" in out
    assert "revolve" in out
    assert "segment" in out
    assert len(re.findall(r"\byes\b", out)) == 1


def test_the_field_of_a_file_is_planned_too(config_file: Path, capfd: Capture) -> None:
    result = run_json(capfd, config_file)
    candidates = {candidate["name"]: candidate for candidate in result["candidates"]}
    # Which is the fastest is measured, on a machine that may be busy.
    assert result["chosen"] in candidates
    assert candidates["graph"]["recomputed_steps"] == 0


def test_sizes_on_the_command_line_stand_above_those_of_the_file(gray_scott_file: Path, capfd: Capture) -> None:
    result = run_json(capfd, gray_scott_file, "--ram", 4 * CHECKPOINT, "--disk", "0")
    assert (result["slots"]["ram"], result["slots"]["disk"]) == (4, 0)
    assert all(candidate["disk_writes"] == 0 for candidate in result["candidates"])
    result = run_json(capfd, gray_scott_file, "--ram", "64MiB")
    assert result["slots"]["ram"] == STEPS - 1
    assert result["chosen"] in [candidate["name"] for candidate in result["candidates"]]
    assert run_json(capfd, gray_scott_file, "--ram", "auto")["slots"]["ram_bytes"] > 2**20


def test_sizes_on_the_command_line_stand_above_numbers_of_checkpoints(gray_scott_file: Path, capfd: Capture) -> None:
    given = ["--set", "trajectory.ram_slots=2", "--set", "trajectory.disk_slots=1"]
    assert run_json(capfd, gray_scott_file, *given)["slots"]["ram"] == 2
    result = run_json(capfd, gray_scott_file, *given, "--ram", 4 * CHECKPOINT, "--disk", 3 * CHECKPOINT)
    assert (result["slots"]["ram"], result["slots"]["disk"]) == (4, 3)


def test_measuring_runs_every_candidate(gray_scott_file: Path, capfd: Capture) -> None:
    result = run_json(capfd, gray_scott_file, "--measure")
    assert len(result["measured_seconds"]) == len(result["candidates"])
    assert all(seconds > 0 for seconds in result["measured_seconds"])


def test_measured_seconds_are_in_the_table(gray_scott_file: Path, capfd: Capture) -> None:
    assert main(["plan", str(gray_scott_file), "--measure"]) == 0
    assert "measured" in capfd.readouterr().out


@pytest.mark.parametrize("measured", [False, True])
def test_a_sweep_draws_the_choices_from_one_checkpoint_to_all_graphs(
    measured: bool, gray_scott_file: Path, tmp_path: Path, capfd: Capture
) -> None:
    picture = tmp_path / "deep" / "sweep.png"
    result = run_json(capfd, gray_scott_file, "--sweep", "--plot", picture, *(["--measure"] if measured else []))
    assert result["plot"] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    rows = result["sweep"]
    budgets = [row["ram"] for row in rows]
    assert budgets == sorted(set(budgets))
    assert budgets[0] == CHECKPOINT
    assert rows[-1]["seconds"] <= rows[0]["seconds"]
    assert all((row["measured"] is not None) == measured for row in rows)


@pytest.mark.parametrize("given", ["keep=graph", "schedule=all", "keep=stages", "schedule=revolve", "keep=solution"])
def test_a_sweep_leaves_out_what_does_not_fit(
    given: str, gray_scott_file: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pnode_dist.report.plan_plot.draw_sweep", lambda *_: None)
    result = run_json(
        capfd,
        gray_scott_file,
        *("--ram", "64MiB", "--set", f"trajectory.{given}", "--sweep", "--plot", tmp_path / "sweep.png"),
    )
    assert result["sweep"]


def test_a_sweep_says_where_its_picture_is(
    gray_scott_file: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(gray_scott_file), "--sweep"]) == 0
    assert "plan.png" in capfd.readouterr().out
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_without_a_sweep_nothing_is_drawn(
    gray_scott_file: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run_json(capfd, gray_scott_file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_that_cannot_be_written_is_one_line(gray_scott_file: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in complaint(capfd, gray_scott_file, "--sweep", "--plot", tmp_path / "file" / "sweep.png")


def test_no_memory_at_all_is_answered_with_the_smallest_that_works(gray_scott_file: Path, capfd: Capture) -> None:
    line = complaint(capfd, gray_scott_file, "--ram", "0", "--disk", "0")
    assert line.endswith(f"ram = {CHECKPOINT}")
    assert run_json(capfd, gray_scott_file, "--ram", CHECKPOINT, "--disk", "0")["slots"]["ram"] == 1


@pytest.mark.parametrize("wrong", ["lots", "-1", "1e3", "", "12 XB"])
@pytest.mark.parametrize("key", ["ram", "disk"])
def test_a_size_that_is_none_is_answered_in_one_line_naming_it(
    key: str, wrong: str, gray_scott_file: Path, capfd: Capture
) -> None:
    line = complaint(capfd, gray_scott_file, f"--{key}={wrong}")
    assert f"trajectory] {key}" in line or f"trajectory.{key}" in line
    assert wrong in line


def test_error_control_is_answered_in_one_line(gray_scott_file: Path, capfd: Capture) -> None:
    line = complaint(capfd, gray_scott_file, "--set", "solver.rtol=1e-5")
    assert "[solver] rtol, atol: " in line
    assert "cannot be planned" in line


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capfd: Capture) -> None:
    assert "missing.toml" in complaint(capfd, tmp_path / "missing.toml")


@pytest.mark.nightly
def test_two_ranks_print_one_plan_for_their_halves(
    gray_scott_file: Path, tmp_path: Path, mpirun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    command = [sys.executable, "-m", "pnode_dist.cli.main", "plan", str(gray_scott_file), "--json"]
    shorter = ["--set", "problem.window=1"]
    ran = mpirun(2, *command, *shorter, "--measure", "--sweep", "--plot", str(tmp_path / "two.png"))
    assert (ran.returncode, ran.stderr) == (0, "")
    (line,) = ran.stdout.splitlines()
    result = json.loads(line)
    # 10 x 13 points in halves of 5 rows or of 7 and 6 columns.
    assert result["slots"]["checkpoint_bytes"] in (CHECKPOINT // 2, CHECKPOINT * 7 // 13)
    assert result["slots"]["disk"] in (3, 4)
    assert (tmp_path / "two.png").stat().st_size > 10_000


# PETSc's log

LOGGED = """
import petsc4py
petsc4py.init(["logged", "-log_view"])
import torch
from pnode_dist import NeuralODE, Trajectory
class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).double()
    def forward(self, t, u):
        return self.linear(u)
node = NeuralODE(Field(), step_size=0.1, method="dopri5", trajectory=Trajectory(ram_slots=3))
node(torch.ones(2, 3, dtype=torch.float64, requires_grad=True), [0.0, 0.5, 1.0]).sum().backward()
solve = node.last_solve
print("COUNTS", solve.forward_steps, solve.recomputed_steps, solve.function_evaluations, solve.vjps)
"""


def test_petsc_s_log_has_the_events_of_a_solve_in_two_stages(tmp_path: Path) -> None:
    script = tmp_path / "logged.py"
    script.write_text(LOGGED)
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=PATIENCE)
    said = re.search(r"^COUNTS (\d+) (\d+) (\d+) (\d+)$", ran.stdout, re.MULTILINE)
    assert said is not None
    forward, again, evaluations, vjps = map(int, said.groups())
    assert forward == 10
    assert again > 0
    stages = re.findall(r"^ *\d+: +(pnode \w+):", ran.stdout, re.MULTILINE)
    assert stages == ["pnode forward", "pnode backward"]
    before, _, rest = ran.stdout.partition("--- Event Stage 1: pnode forward")
    first, _, second = rest.partition("--- Event Stage 2: pnode backward")
    assert second

    def counts(text: str) -> dict[str, int]:
        return {name: int(count) for name, count in re.findall(r"^(pnode \w+) +(\d+) ", text, re.MULTILINE)}

    per_step = 6
    assert counts(first)["pnode step"] == forward
    assert counts(first)["pnode f"] == per_step * forward
    assert not {"pnode recompute", "pnode vjp", "pnode adjoint"} & {k for k, v in counts(first).items() if v}
    assert counts(second)["pnode recompute"] == again
    assert counts(second)["pnode f"] == per_step * again
    # Every step here is a graph of its own, which is one pass of autograd.
    assert counts(second)["pnode vjp"] == forward
    assert vjps == per_step * forward
    assert counts(second)["pnode adjoint"] == forward
    assert counts(first)["pnode f"] + counts(second)["pnode f"] == evaluations
    assert counts(before).get("pnode f", 0) == 0
