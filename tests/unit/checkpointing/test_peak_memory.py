"""The resident memory of a solve grows by no more than its budget and the working set of one recorded step.

The working set, with PETSc's vectors and the solution, is that of a solve with a single checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.tiers import at_night

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "debian" in torch.__version__,
        reason="with Debian's build of torch the process keeps what it frees, so that its peaks do not add up",
    ),
]

MIB = 2**20
STATE = 4 * MIB
# Beyond the budget, to the byte, there is nothing but what the allocator and the interpreter need.
SLACK = STATE // 2
STAGING_BUFFERS = 3 * STATE

PROGRAM = """
import gc
import json
import sys

import torch
from pnode_dist import NeuralODE, Trajectory

torch.set_num_threads(1)


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, t, u):
        return -u * self.theta


u0 = torch.ones(2**19, dtype=torch.float64, requires_grad=True)
small = torch.ones(4, dtype=torch.float64, requires_grad=True)


def measure(steps, control, given):
    solver = {"method": "euler", "step_size": 0.01, **control}
    # What is loaded on first use is no part of a solve.
    for used in (Trajectory("1MiB"), Trajectory(ram_slots=1, disk_slots=2, directory=given["directory"])):
        NeuralODE(Decay(), trajectory=used, **solver)(small, [0.0, 0.1])[-1].sum().backward()
    node = NeuralODE(Decay(), trajectory=Trajectory(**given), **solver)
    u0.grad = None
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        begun = status("VmRSS")
        peak = status("VmHWM")
        assert peak < begun + 2**20
    except (OSError, AssertionError):
        return None
    node(u0, [0.0, 0.01 * steps])[-1].sum().backward()
    solve = node.last_solve
    return {
        "grown": status("VmHWM") - begun, "recomputed": solve.recomputed_steps, "kept": solve.graph_steps,
        "written": solve.bytes_written, "checkpoints": solve.checkpoint_bytes_peak, "graphs": solve.graph_bytes,
        "steps": solve.forward_steps,
    }


for line in sys.stdin:
    print(json.dumps(measure(*json.loads(line))), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Solve with Euler steps of a 4 MiB state in a process for these solves alone: what it says of its peak."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        # Freed memory goes back to the system at once, so that the peak is of what is in use.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    questions, answers = process.stdin, process.stdout

    def in_process(steps: int = 40, control: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        given["directory"] = str(tmp_path_factory.mktemp("scratch"))
        print(json.dumps([steps, control or {}, given]), file=questions, flush=True)
        found: dict[str, Any] | None = json.loads(answers.readline())
        if found is None:
            pytest.skip("the peak of resident memory cannot be reset here")
        return found

    with process:
        yield in_process


@pytest.fixture(scope="module")
def working_set(run: Callable[..., dict[str, Any]]) -> int:
    """What a solve takes beside the one checkpoint that it cannot do without."""
    found = run(steps=6, ram=STATE, keep="solution")
    assert found["checkpoints"] == STATE
    working_set: int = found["grown"] - STATE
    return working_set


def test_the_working_set_is_a_handful_of_states(working_set: int) -> None:
    # Solution and its cotangent 2 each, PETSc's vectors, one recorded step and its vector-Jacobian product.
    assert working_set <= 18 * STATE


@pytest.mark.parametrize("ram", [24, 80])
def test_checkpoints_stay_within_the_budget(ram: int, run: Callable[..., dict[str, Any]], working_set: int) -> None:
    found = run(ram=f"{ram}MiB", keep="solution")
    # The tape of the last step is one state.
    assert found["checkpoints"] + found["graphs"] == ram * MIB
    assert found["recomputed"] >= 39
    # All of it is used, and nothing more. The tape is reversed before another step is recorded: the working set.
    assert abs(found["grown"] - working_set - found["checkpoints"]) <= SLACK


def test_checkpoints_on_disk_take_no_memory_but_their_staging_buffers(
    run: Callable[..., dict[str, Any]], working_set: int
) -> None:
    found = run(ram="24MiB", disk="80MiB", keep="solution", schedule="multistage")
    assert found["written"] >= 20 * STATE
    assert found["checkpoints"] + found["graphs"] == 104 * MIB
    assert found["grown"] <= working_set + 24 * MIB + STAGING_BUFFERS + SLACK


@pytest.mark.parametrize("keep", ["auto", "stages"])
def test_what_is_kept_of_all_steps_is_what_is_charged_for_it(
    keep: str, run: Callable[..., dict[str, Any]], working_set: int
) -> None:
    found = run(steps=20, ram="512MiB", keep=keep)
    assert (found["kept"], found["recomputed"]) == (20, 0)
    # The working set has room for one of them: no step is recomputed.
    assert found["grown"] <= working_set + found["graphs"] * 19 // 20 + SLACK
    assert found["grown"] >= found["graphs"]


@pytest.mark.parametrize("keep", ["auto", "stages"])
def test_graphs_or_stages_of_some_steps_and_checkpoints_stay_within_the_budget(
    keep: str, run: Callable[..., dict[str, Any]], working_set: int
) -> None:
    found = run(steps=30, ram="80MiB", keep=keep)
    assert found["recomputed"] > 0
    assert 50 * MIB <= found["grown"] <= working_set + 80 * MIB + SLACK


def test_checkpoints_in_single_precision_take_half(run: Callable[..., dict[str, Any]], working_set: int) -> None:
    found = run(ram_slots=20, keep="solution", checkpoint_dtype="float32")
    assert found["checkpoints"] == 20 * STATE // 2
    assert found["grown"] <= working_set + 20 * STATE // 2 + SLACK


# Steps that error control is not to make longer than those of fixed size, so that there are as many or a few more.
CONTROL = {"method": "heun", "rtol": 1e-3, "atol": 1e-3, "options": {"ts_adapt_dt_max": 0.01}}


@pytest.fixture(scope="module")
def working_set_of_control(run: Callable[..., dict[str, Any]]) -> int:
    """What a solve with error control takes beside one checkpoint."""
    found = run(steps=6, control=CONTROL, ram=STATE, keep="solution")
    assert found["checkpoints"] == STATE
    working_set: int = found["grown"] - STATE
    return working_set


@pytest.mark.parametrize("keep", at_night(["solution", "auto"], but=["solution"]))
def test_with_error_control_too_all_that_is_kept_stays_within_the_budget(
    keep: str, run: Callable[..., dict[str, Any]], working_set_of_control: int
) -> None:
    # Graphs are kept until there are more than fit, and given up then for the checkpoints that were kept beside them.
    found = run(control=CONTROL, ram="80MiB", keep=keep)
    assert found["steps"] >= 40
    assert found["recomputed"] >= 40
    assert found["checkpoints"] == 80 * MIB
    assert 70 * MIB <= found["grown"] - working_set_of_control <= 80 * MIB + SLACK


@pytest.mark.nightly
def test_with_error_control_too_graphs_of_all_steps_are_charged_for(
    run: Callable[..., dict[str, Any]], working_set_of_control: int
) -> None:
    ram = 800 * MIB
    found = run(steps=20, control=CONTROL, ram=ram)
    assert found["recomputed"] == 0
    assert found["kept"] == found["steps"] >= 20
    assert found["graphs"] <= found["grown"] <= working_set_of_control + ram + SLACK
