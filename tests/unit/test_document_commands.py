"""Every command that the documents show is run: in short for every change, and in full at night."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import pytest

from pnode_dist.bench import BENCHMARKS, CONFIGURED
from pnode_dist.bench.methods import run as methods
from pnode_dist.bench.methods.accuracy import compare_while_training
from pnode_dist.cli.main import main
from tests.conftest import PATIENCE, ROOT
from tests.documents import Block, all_blocks, blocks_of, report, shown_commands
from tests.in_short import SMALL
from tests.unit.test_examples import LOOP_COMMAND

Run = Callable[..., subprocess.CompletedProcess[str]]
BLOCKS = all_blocks()
COMMANDS = shown_commands(BLOCKS)
SESSIONS = [block for block in BLOCKS if block.language == "console"]
# Run here; the others are run by .ci/run or the demonstration itself.
QUICK = [
    "pnode-dist methods",
    "pnode-dist doctor",
    "pnode-dist config init burgers",
    "pnode-dist config reference burgers",
    "pnode-dist config schema burgers",
    "pnode-dist completion bash",
]


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
    monkeypatch.setattr(methods, "compare_while_training", lambda each: compare_while_training(each, iterations=2))
    assert main(["bench", "methods", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    naive = [row for row in found["rows"] if row["method"] == "NODE-naive"]
    assert [(row["solver"], row["gradient error"], row["x naive"]) for row in naive] == [("dopri5", 0, 1)]
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["largest gradient error of a reverse-accurate method"]["holds"]
    assert checks["counts that differ from the theory"]["holds"]


def in_full(command: str) -> str:
    """A command of .ci/run as the documents show it: there trainings and their data are short, and benchmarks small."""
    command = command.replace("python tests/in_short.py ", "pnode-dist ")
    problem = r"problem\.(spin_up|coarse_spin_up|trajectories|validation|times)"
    short = rf"training\.epochs|inverse\.iterations|evaluation\.free_run|{problem}"
    return re.sub(rf"( --set ({short})=[\d.]+)+$", "", command)


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
    many = ["timeout -k 10 1800 launch/test.sh --nightly --no-lint --ranks", "tests/mpi/test_many_ranks.py"]
    assert at_night[0] == "launch/test.sh --nightly"
    assert at_night[1:5] == [f" {ranks} ".join(many) for ranks in (8, 16, 27, 64)]
    assert at_night[5] == "launch/matrix.sh"
    assert at_night[6:] == [command for command in COMMANDS if command != "launch/test.sh"]


def test_every_other_benchmark_has_a_short_form() -> None:
    # The comparison with peers runs at night, with its own environment; its solvers have tests.
    assert set(SMALL) == set(BENCHMARKS) - {"gradient", "methods", "peers", *CONFIGURED}


def test_a_command_that_needs_a_run_comes_after_its_training() -> None:
    trained: set[str] = set()
    for command in COMMANDS:
        if match := re.search(r"train (?:\S+/)?(\w+)\.toml(.*)", command):
            assert match[1] in trained or "--resume" not in match[2], command
            trained.add(match[1])
        if command == "launch/demo.sh":
            trained.add("sea_surface")
        for name in re.findall(r"(?:evaluate|report|status) runs/(\w+)", command):
            assert name in trained, command


def programs(command: str) -> list[str]:
    """The scripts that a command runs, or its program."""
    words = command.split()
    scripts = [Path(word).name for word in words if re.search(r"\.(sh|sbatch|py)$", word)]
    return scripts or list(takewhile(lambda word: not word.startswith("-"), words))[:2]


@pytest.mark.parametrize("block", SESSIONS, ids=lambda block: f"{block.page}:{block.line}")
def test_a_session_names_the_files_that_run_its_commands(block: Block) -> None:
    assert bool(block.run_by) != bool(block.not_run)
    texts = [(ROOT / name).read_text() for name in block.run_by]
    if any(Path(block.page).name in text for text in texts):
        # That test takes its commands from the page.
        return
    for command in block.commands if block.run_by else ():
        if command.startswith(("export ", "sed ", "source ")):
            continue
        assert any(program in text for program in programs(command) for text in texts), command


def test_the_session_of_a_configuration_runs_as_it_is(tmp_path: Path) -> None:
    (session,) = [block for block in SESSIONS if "config schema" in block.text]
    done = subprocess.run(
        ["bash", "-euc", "\n".join([*session.commands, "complete -p pnode-dist"])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pnode-dist" in done.stdout
    assert (tmp_path / "my.toml").read_text().startswith("#:schema ./burgers.schema.json\n")
    assert json.loads((tmp_path / "burgers.schema.json").read_text())["title"] == "pnode-dist configuration: burgers"


def test_blocks_that_nothing_runs_are_listed_with_their_reason() -> None:
    not_run = "<!-- not run: needs a ship -->\n```console\n$ sail\n```\n"
    run_elsewhere = "<!-- run by: a.py, b.py -->\n```sh\nswim\n```\n"
    page = f"{not_run}\n```sh\nrow\n```\n{run_elsewhere}"
    blocks = blocks_of(page, "sea.md")
    assert shown_commands(blocks) == ["row"]
    assert blocks[2].run_by == ("a.py", "b.py")
    assert report(blocks).splitlines() == [
        "0 blocks of Python are run as they are, 0 by other tests",
        "1 blocks of shell are run as they are (1 commands), 1 by other tests",
        "1 not run:",
        "  sea.md:2: needs a ship",
    ]
