"""The comparison: ratios, targets, and what it says where a solver or an environment fails."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pnode_dist.bench.peers import environment
from pnode_dist.bench.peers.cases import case_of
from pnode_dist.bench.peers.run import Measured, checks_of, chosen, measure, rows_of, run
from pnode_dist.bench.peers.worker import Worker, WorkerError
from pnode_dist.errors import ConfigurationError

END = np.array([1.0, 2.0])


def measured(forward: float, gradient: float, error: float = 0.0) -> Measured:
    arrays = {"end": END * (1 + error), "u0": END}
    return Measured([forward, 9.0, forward], [gradient, gradient, 9.0], (0.5, 1.0), 2**20, arrays)


def test_ratios_are_of_medians_and_differences_relative_to_plain_torch() -> None:
    found = {"pnode_dist": measured(2.0, 3.0, 1e-3), "plain torch": measured(1.0, 6.0)}
    ours, plain = rows_of(case_of("tiny"), found)
    assert (ours["forward"], ours["x"], ours["x "], ours["first"], ours["MiB"]) == (2000.0, 1.0, 1.0, 1.5, 1.0)
    assert (plain["x"], plain["x "]) == (2.0, 0.5)
    assert ours["state"] == pytest.approx(1e-3)
    assert plain["state"] == plain["grad"] == ours["grad"] == 0.0


def test_a_case_is_checked_against_the_fastest_solver_that_was_measured() -> None:
    found = {
        "pnode_dist": measured(1.0, 2.0),
        "pnode_dist compiled": measured(1.0, 2.0),
        "plain torch": measured(4.0, 4.0),
        "torchode": measured(0.5, 8.0),
    }
    checks = {check.name: check.value for check in checks_of(case_of("medium"), found)}
    assert checks == {
        "medium: gradient, eager over plain torch": 0.5,
        "medium: forward, pnode_dist compiled over torchode": 2.0,
        "medium: gradient, pnode_dist compiled over plain torch": 0.5,
    }


def test_an_unknown_case_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"--cases huge: must be some of tiny, .*, stiff imex"):
        chosen(["tiny", "huge"])


@pytest.mark.slow
def test_a_worker_answers_and_says_why_it_cannot() -> None:
    python = {"plain torch": Path(sys.executable), "torchode": Path(sys.executable)}
    found, failed = measure(case_of("stiff euler"), python, core=0)
    assert not found
    assert failed.keys() == python.keys()
    assert all("Error" in reason for reason in failed.values())
    with Worker("tiny", "plain torch", Path(sys.executable), 0) as worker:
        assert worker.ask("gradient")["seconds"] > 0
        assert worker.ask("memory")["bytes"] > 0
        worker.process.kill()
        with pytest.raises(WorkerError, match="ended without an answer"):
            worker.ask("forward")


def test_an_interpreter_without_diffrax_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VARIABLE, sys.executable)
    with pytest.raises(ConfigurationError, match=f"{environment.VARIABLE} = .*No module named 'diffrax'"):
        environment.python_with_diffrax()


def test_what_pip_says_last_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "PINS", (str(tmp_path / "none-1.0-py3-none-any.whl"),))
    with pytest.raises(ConfigurationError, match=r"cannot install .*any\.whl: .*none-1\.0-py3-none-any\.whl"):
        environment.python_with_diffrax()
    assert not list(tmp_path.rglob("complete"))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_diffrax_and_this_project_agree_on_every_exact_case() -> None:
    names = ["tiny", "stiff euler", "stiff esdirk", "stiff imex"]
    report = run(names)
    ours = [row for row in report.rows if row["solver"] == "pnode_dist"]
    rival = [row for row in report.rows if row["solver"] == "diffrax"]
    assert [row["case"] for row in ours] == [row["case"] for row in rival] == names
    assert max(float(row["grad"]) for row in (*ours, rival[0])) < 1e-9
    assert max(float(row["state"]) for row in (*ours, rival[0])) < 1e-9
