"""Checkpoints in single precision: half the bytes, for a gradient that is off by the rounding that is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pnode_dist import ConfigurationError, NeuralODE, Trajectory
from pnode_dist.checkpointing.store import PrecisionError
from pnode_dist.config.load import load
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random

# Two by three numbers of 4 bytes; 20 steps.
SHORT, STEPS, TIMES = 24, 20, [0.0, 1.0]
HALF_UNIT = 2.0**-24


def node_of(trajectory: Trajectory, method: str = "rk4", dtype: torch.dtype = torch.float64) -> NeuralODE:
    return NeuralODE(Network(dtype=dtype), method=method, step_size=0.05, trajectory=trajectory)


def solved(node: NeuralODE, u0: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    start = random(2, 3) if u0 is None else u0
    return gradients(lambda u: node(u, TIMES), start, list(node.parameters()))


@pytest.fixture
def exact() -> tuple[torch.Tensor, ...]:
    """The solution and gradient without any rounding of checkpoints."""
    return solved(node_of(Trajectory("1MiB", keep="graph")))


@pytest.mark.parametrize(("ram", "disk"), [(3, 0), (2, 2), (0, 3)])
def test_the_gradient_is_off_by_about_the_rounding_that_is_reported(
    ram: int, disk: int, tmp_path: Path, exact: tuple[torch.Tensor, ...]
) -> None:
    node = node_of(Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path, checkpoint_dtype="float32"))
    found = solved(node)
    # Steps of the forward pass never start from a checkpoint.
    assert identical(found[:1], exact[:1])
    for gradient, wanted in zip(found[1:], exact[1:], strict=True):
        assert 1e-12 < distance(gradient, wanted) < 1e-5
    assert 0 < node.last_solve.largest_rounding <= HALF_UNIT * 1.01


def test_the_rounding_is_reported_by_the_forward_pass_already() -> None:
    node = node_of(Trajectory(ram_slots=3, checkpoint_dtype="float32"))
    waiting = node(random(2, 3).requires_grad_(), TIMES)
    assert 0 < node.last_solve.largest_rounding <= HALF_UNIT * 1.01
    del waiting


def test_checkpoints_take_half_the_bytes_and_as_many_are_written(tmp_path: Path) -> None:
    counts = {}
    for dtype in ("float64", "float32"):
        node = node_of(Trajectory(ram_slots=1, disk_slots=2, directory=tmp_path, checkpoint_dtype=dtype))
        solved(node)
        counts[dtype] = node.last_solve
    full, half = counts["float64"], counts["float32"]
    assert full.checkpoint_bytes_peak == 2 * half.checkpoint_bytes_peak == 3 * 2 * SHORT
    assert full.bytes_written == 2 * half.bytes_written > 0
    assert full.bytes_read == 2 * half.bytes_read > 0
    assert full.recomputed_steps == half.recomputed_steps


def test_the_same_budget_pays_for_twice_as_many_checkpoints(tmp_path: Path) -> None:
    for ram, disk, slots in ((4, 0, 4), (4, 2, 6), (2, 4, 6)):
        for dtype, times in (("float64", 1), ("float32", 2)):
            trajectory = Trajectory(
                ram * SHORT,
                disk * SHORT,
                tmp_path,
                keep="solution",
                schedule="multistage",
                checkpoint_dtype=dtype,
            )
            node = node_of(trajectory)
            solved(node)
            # A tape takes more than all of the memory.
            wanted = fewest_solve_steps(STEPS, slots * times // 2, tapes=0)
            assert node.last_solve.forward_steps + node.last_solve.recomputed_steps == wanted
            assert trajectory.ledger.ram == 0


def test_the_smallest_budget_that_works_is_that_of_one_half_size_checkpoint() -> None:
    with pytest.raises(ConfigurationError, match=f"the smallest that works is ram = {SHORT}$"):
        solved(node_of(Trajectory(ram=SHORT - 1, checkpoint_dtype="float32")))
    solved(node_of(Trajectory(ram=SHORT, checkpoint_dtype="float32")))


@pytest.mark.parametrize("keep", ["graph", "stages", "auto"])
def test_what_is_not_run_again_is_not_rounded(keep: str, exact: tuple[torch.Tensor, ...]) -> None:
    node = node_of(Trajectory("1MiB", keep=keep, checkpoint_dtype="float32"))
    assert distance(solved(node), exact) <= 1e-14
    assert node.last_solve.recomputed_steps == 0
    assert node.last_solve.largest_rounding == 0


def test_stages_that_are_kept_have_every_bit_beside_rounded_checkpoints() -> None:
    # Kept stages are no checkpoints: their bytes are those of float64.
    node = node_of(Trajectory("1MiB", keep="stages", checkpoint_dtype="float32"))
    solved(node)
    assert node.last_solve.graph_bytes == STEPS * 4 * 2 * SHORT


def test_by_default_nothing_is_rounded(exact: tuple[torch.Tensor, ...]) -> None:
    node = node_of(Trajectory(ram_slots=2))
    assert identical(solved(node), exact)
    assert node.last_solve.largest_rounding == 0.0
    assert Trajectory().checkpoint_dtype == "float64"


def test_with_error_control_too_the_gradient_is_off_by_about_the_rounding(tmp_path: Path) -> None:
    def adaptive(trajectory: Trajectory) -> NeuralODE:
        return NeuralODE(Network(), rtol=1e-7, atol=1e-9, step_size=0.01, trajectory=trajectory)

    wanted = solved(adaptive(Trajectory(ram_slots=2)))
    node = adaptive(Trajectory(ram_slots=2, disk_slots=1, directory=tmp_path, checkpoint_dtype="float32"))
    found = solved(node)
    assert identical(found[:1], wanted[:1])
    assert 1e-12 < distance(found[1:], wanted[1:]) < 1e-5
    assert 0 < node.last_solve.largest_rounding <= HALF_UNIT * 1.01


def test_a_checkpoint_that_moves_from_memory_to_disk_is_rounded_once(tmp_path: Path) -> None:
    # With error control the earliest checkpoints move; the state that comes back is the one rounded in memory.
    def of(**slots: int) -> tuple[torch.Tensor, ...]:
        trajectory = Trajectory(directory=tmp_path, checkpoint_dtype="float32", **slots)
        return solved(NeuralODE(Network(), rtol=1e-6, atol=1e-8, step_size=0.01, trajectory=trajectory))

    assert identical(of(ram_slots=1, disk_slots=3), of(ram_slots=4))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_checkpoints_of_a_float32_state_are_exact_and_no_wider(dtype: str) -> None:
    u0 = random(2, 3, dtype=torch.float32)
    node = node_of(Trajectory(ram_slots=2, checkpoint_dtype=dtype), dtype=torch.float32)
    plain = node_of(Trajectory("1MiB", keep="graph"), dtype=torch.float32)
    assert identical(solved(node, u0), solved(plain, u0))
    assert node.last_solve.largest_rounding == 0
    assert node.last_solve.checkpoint_bytes_peak == 2 * SHORT


def test_a_float64_state_of_a_float32_function_is_rounded_by_float32_checkpoints() -> None:
    # A step ends between the numbers of float32.
    u0 = random(2, 3, dtype=torch.float32)
    node, plain = (
        node_of(Trajectory(ram_slots=2, checkpoint_dtype=dtype), dtype=torch.float32)
        for dtype in ("float32", "float64")
    )
    node.state_dtype = plain.state_dtype = torch.float64
    assert distance(solved(node, u0), solved(plain, u0)) < 1e-5
    assert node.last_solve.largest_rounding > 0
    assert plain.last_solve.checkpoint_bytes_peak == 2 * 2 * SHORT


@pytest.mark.parametrize("rtol", [None, 1e-3], ids=["steps of fixed size", "error control"])
@pytest.mark.parametrize(("ram", "disk"), [(2, 0), (0, 2)], ids=["memory", "disk"])
def test_a_value_beyond_float32_is_one_clear_error(ram: int, disk: int, rtol: float | None, tmp_path: Path) -> None:
    def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -u * torch.tensor([1.0, 0.0])

    u0 = torch.tensor([1.0, 3.5e38], dtype=torch.float64, requires_grad=True)
    trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path, checkpoint_dtype="float32")
    node = NeuralODE(decay, step_size=0.05, rtol=rtol, trajectory=trajectory, method="dopri5")
    with pytest.raises(PrecisionError, match=r"3\.5e\+38 .* does not fit float32: use checkpoint_dtype = ") as caught:
        node(u0, TIMES)
    assert "\n" not in str(caught.value)
    # What fits is solved by the same module, and the full precision has no such limit.
    assert bool(torch.isfinite(node((u0 * 1e-3).detach().requires_grad_(), TIMES)).all())
    node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path)
    node(u0, TIMES)[-1].sum().backward()
    assert u0.grad is not None
    assert bool(torch.isfinite(u0.grad).all())


def test_an_unknown_type_is_refused_naming_the_known() -> None:
    with pytest.raises(ConfigurationError, match="checkpoint_dtype = 'float16': must be one of float64, float32"):
        Trajectory(checkpoint_dtype="float16")


def test_the_key_of_the_configuration_reaches_the_budget(config_file: Path) -> None:
    assert load(config_file).trajectory.build().checkpoint_dtype == "float64"
    narrow = load(config_file, ["trajectory.checkpoint_dtype=float32"]).trajectory.build()
    assert narrow.checkpoint_dtype == "float32"
    assert narrow.slot_dtype(np.dtype("float64")) == np.float32
    with pytest.raises(ConfigurationError, match="checkpoint_dtype") as caught:
        load(config_file, ["trajectory.checkpoint_dtype=float16"])
    assert "\n" not in str(caught.value)
