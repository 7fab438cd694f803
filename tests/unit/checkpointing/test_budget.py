"""Budgets: how sizes are written, how many checkpoints they pay for, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pnode_dist import CheckpointBudget, NeuralODE, Trajectory
from pnode_dist.checkpointing.budget import parse_size
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.sizes import format_size
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.right_hand_sides import Network, random

# Two by three numbers of 8 bytes.
U0, CHECKPOINT = random(2, 3), 48


def solved(trajectory: Trajectory, times: tuple[float, ...] = (0.0, 1.0), u0: torch.Tensor = U0) -> NeuralODE:
    node = NeuralODE(Network(dtype=u0.dtype), step_size=0.05, trajectory=trajectory)
    node(u0, times)[-1].sum().backward()
    return node


def test_trajectory_is_the_same_class_as_the_checkpoint_budget() -> None:
    assert Trajectory is CheckpointBudget
    assert solved(CheckpointBudget(ram_slots=2)).last_solve == solved(Trajectory(ram_slots=2)).last_solve


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("256MiB", 256 * 2**20),
        ("256 MiB", 256 * 2**20),
        (" 2GiB ", 2 * 2**30),
        ("1.5GB", 1_500_000_000),
        (".5KiB", 512),
        ("3TiB", 3 * 2**40),
        ("64mib", 64 * 2**20),
    ],
)
def test_a_size_is_read(written: int | str, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "MiB",
        "12 XB",
        "-1",
        "-5MiB",
        "1e3",
        "1,5GB",
        "1 2",
        "0x10",
        "nan",
        "inf",
        "12MiB!",
        "1_000",
        "five",
        "1.5",
        "2.5B",
    ],
)
def test_a_string_that_is_no_size_is_refused(written: str) -> None:
    with pytest.raises(ConfigurationError, match="size = ") as caught:
        parse_size(written)
    assert repr(written) in str(caught.value)
    assert "MiB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None, [1], b"1MiB"])
def test_a_value_that_is_no_size_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="size = "):
        parse_size(wrong)


@pytest.mark.parametrize(
    ("size", "written"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (2**40, "1.0 TiB")]
)
def test_a_size_is_written_for_people(size: int, written: str) -> None:
    assert format_size(size) == written


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ram": "lots"}, "trajectory: ram: size = 'lots'"),
        ({"disk": "-1GiB"}, "trajectory: disk: size = '-1GiB'"),
        ({"ram": -1}, "trajectory: ram: size = -1"),
        ({"ram_slots": -1}, "trajectory: ram_slots = -1"),
        ({"disk_slots": 1.5}, "trajectory: disk_slots = 1.5"),
        ({"ram_slots": True}, "trajectory: ram_slots = True"),
        ({"keep": "everything"}, "trajectory: keep = 'everything': must be one of "),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused_at_once(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Trajectory(**settings)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trajectory", "checkpoints", "tapes"),
    [
        # A tape takes as much as 11 1/3 checkpoints.
        (Trajectory(ram=CHECKPOINT, keep="solution"), 1, 0),
        (Trajectory(ram=3 * CHECKPOINT + CHECKPOINT - 1, keep="solution"), 3, 0),
        (Trajectory(ram="0.1 KiB", keep="solution"), 2, 0),
        (Trajectory(ram=CHECKPOINT - 1, disk=2 * CHECKPOINT, keep="solution", schedule="multistage"), 2, 0),
        (Trajectory(ram=2 * CHECKPOINT, disk=4 * CHECKPOINT, keep="solution", schedule="multistage"), 6, 0),
        (Trajectory(ram=19 * CHECKPOINT, keep="solution"), 19, 0),
        (Trajectory(ram=30 * CHECKPOINT, keep="solution"), 18, 1),
        (Trajectory(ram="256MiB", keep="solution"), 18, 1),
        (Trajectory(ram=0, ram_slots=4), 4, 0),
        (Trajectory(ram=15 * CHECKPOINT, ram_slots=4), 4, 0),
        (Trajectory(ram=16 * CHECKPOINT, ram_slots=4), 4, 1),
        (Trajectory(ram=0, ram_slots=1, disk_slots=2), 3, 0),
    ],
)
def test_bytes_pay_for_as_many_checkpoints_as_fit(trajectory: Trajectory, checkpoints: int, tapes: int) -> None:
    solve = solved(trajectory).last_solve
    assert solve.forward_steps + solve.recomputed_steps == fewest_solve_steps(20, checkpoints, tapes)
    assert solve.graph_steps == tapes
    assert solve.checkpoint_bytes_peak == checkpoints * CHECKPOINT
    assert solve.adjoint_steps == 20


def test_a_budget_for_all_graphs_runs_no_step_twice_and_keeps_no_checkpoint() -> None:
    for trajectory in (Trajectory("1MiB"), Trajectory("1MiB", keep="graph"), Trajectory("1MiB", disk="1MiB")):
        solve = solved(trajectory).last_solve
        assert (solve.forward_steps, solve.recomputed_steps, solve.adjoint_steps) == (20, 0, 20)
        assert solve.graph_steps == 20
        assert solve.graph_bytes >= 20 * CHECKPOINT
        assert (solve.checkpoint_bytes_peak, solve.bytes_written) == (0, 0)


def test_a_budget_for_some_graphs_stays_within_itself_and_saves_steps() -> None:
    one = solved(Trajectory("1MiB")).last_solve.graph_bytes // 20
    few, more = (solved(Trajectory(ram=n * one)).last_solve for n in (1, 8))
    bare = solved(Trajectory(ram=8 * one, keep="solution")).last_solve
    assert 1 < more.graph_steps < 20
    assert more.checkpoint_bytes_peak + more.graph_steps * one <= 8 * one
    assert more.recomputed_steps < bare.recomputed_steps
    assert more.recomputed_steps < few.recomputed_steps


def test_graphs_that_do_not_fit_are_refused_where_all_are_demanded() -> None:
    with pytest.raises(ConfigurationError, match="keep = 'graph'") as caught:
        solved(Trajectory(ram=CHECKPOINT, keep="graph"))
    assert "ram = " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_float32_state_is_kept_in_petsc_s_scalar_type() -> None:
    node = solved(Trajectory(ram=2 * CHECKPOINT), u0=U0.float())
    assert node.last_solve.checkpoint_bytes_peak == 2 * CHECKPOINT


@pytest.mark.parametrize("trajectory", [Trajectory(ram=0), Trajectory(ram=CHECKPOINT - 1, disk=CHECKPOINT - 1)])
def test_a_budget_too_small_for_a_checkpoint_names_the_smallest_that_works(trajectory: Trajectory) -> None:
    with pytest.raises(ConfigurationError, match="too small for one checkpoint") as caught:
        solved(trajectory)
    message = str(caught.value)
    assert message.endswith(f"ram = {CHECKPOINT}")
    assert "\n" not in message
    solved(Trajectory(ram=CHECKPOINT))


def test_zero_slots_are_too_few() -> None:
    with pytest.raises(ConfigurationError, match=r"too small|slots"):
        solved(Trajectory(ram_slots=0, disk_slots=0))


@pytest.mark.parametrize("keep", ["solution", "stages", "auto"])
@pytest.mark.parametrize(("ram", "again"), [(0, 1), ("1kB", 0)])
def test_a_single_step_needs_no_checkpoint_and_is_recomputed_if_no_tape_fits(
    ram: int | str, again: int, keep: str
) -> None:
    solve = solved(Trajectory(ram=ram, keep=keep), times=(0.0, 0.05)).last_solve
    assert (solve.forward_steps, solve.recomputed_steps, solve.adjoint_steps) == (1, again, 1)
    assert solve.checkpoint_bytes_peak == 0


def test_the_default_directory_is_the_job_s_scratch_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert Trajectory().scratch == tmp_path
    assert Trajectory(directory="/somewhere").scratch == Path("/somewhere")


@pytest.mark.parametrize("kind", ["missing", "file", "unwritable"])
def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_computed(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    # Not even root makes directories in /proc.
    directory = Path("/proc") if kind == "unwritable" else tmp_path / kind
    calls = 0

    class Counting(Network):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().forward(t, u)

    node = NeuralODE(Counting(), step_size=0.1, trajectory=Trajectory(ram_slots=1, disk_slots=2, directory=directory))
    with pytest.raises(ConfigurationError, match="trajectory: directory") as caught:
        node(U0, [0.0, 1.0])
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert calls == 0


def test_a_directory_is_not_needed_when_memory_suffices(tmp_path: Path) -> None:
    solved(Trajectory(disk="1MiB", directory=tmp_path / "missing"))
