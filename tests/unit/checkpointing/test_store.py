"""Slots give back what was put into them, to the last bit or to the precision that was asked for, and never less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.spill import STAGING_BUFFERS, SpillPool
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.checkpointing.store import (
    Checkpoints,
    MemoryPool,
    PrecisionError,
    SlotPool,
    SpillError,
    State,
    copy_rounded,
)
from tests.conftest import PATIENCE
from tests.oracles.right_hand_sides import Network, random

SIZE = 100_003  # more than one block, and no multiple of one
HALF_UNIT = 2.0**-24
NewPool = Callable[[int, str], SlotPool]


@pytest.fixture(params=["memory", "disk"])
def new_pool(request: pytest.FixtureRequest, tmp_path: Path) -> NewPool:
    def make(size: int, dtype: str) -> SlotPool:
        if request.param == "memory":
            return MemoryPool(size, np.dtype(dtype))
        return SpillPool(size, np.dtype(dtype), tmp_path, 0)

    return make


@pytest.fixture
def state() -> State:
    """Numbers of all magnitudes that float32 has normal numbers for."""
    generator = np.random.default_rng(0)
    return generator.choice([-1.0, 1.0], SIZE) * 10 ** generator.uniform(-37, 38, SIZE)


def settle(pool: SlotPool) -> None:
    """Until a pool's thread has written everything, so that it is read from the file."""
    if isinstance(pool, SpillPool):
        with pool._file.changed:
            assert pool._file.changed.wait_for(
                lambda: not any(slot.busy for slot in pool._file.slots), timeout=PATIENCE
            )


def round_trip(pool: SlotPool, state: State, settled: bool = True) -> tuple[State, float]:
    slot = pool.acquire()
    rounding = pool.write(slot, state, 0, 0.0)
    if settled:
        settle(pool)
    found = np.full_like(state, 7.0)
    pool.read(slot, found)
    pool.release(slot)
    return found, rounding


def bits(state: State) -> Any:
    return state.view(np.uint64).tolist()


def test_slots_of_the_state_s_type_give_back_every_bit(new_pool: NewPool, state: State) -> None:
    state[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324]
    found, rounding = round_trip(new_pool(SIZE, "float64"), state)
    assert bits(found) == bits(state)
    assert rounding == 0.0


@pytest.mark.parametrize("settled", [True, False])
def test_slots_in_float32_round_every_entry_to_the_nearest(new_pool: NewPool, state: State, settled: bool) -> None:
    found, rounding = round_trip(new_pool(SIZE, "float32"), state, settled)
    assert np.all(np.abs(found - state) <= HALF_UNIT * np.abs(state))
    assert np.array_equal(found, state.astype(np.float32).astype(np.float64))
    assert rounding == np.abs(found - state).max() / np.abs(state).max()
    assert 0.0 < rounding <= HALF_UNIT


def test_a_state_that_float32_holds_exactly_is_not_rounded(new_pool: NewPool) -> None:
    state = np.arange(-8.0, 8.0) / 4
    found, rounding = round_trip(new_pool(16, "float32"), state)
    assert bits(found) == bits(state)
    assert rounding == 0.0


@pytest.mark.parametrize("value", [1e39, -1e300, 3.4028235677973366e38])
@pytest.mark.parametrize("place", [0, SIZE - 1])
def test_a_value_that_float32_cannot_hold_is_an_error(
    new_pool: NewPool, state: State, value: float, place: int
) -> None:
    state[place] = value
    pool = new_pool(SIZE, "float32")
    slot = pool.acquire()
    expected = rf'a value of {abs(value):.3g} in the state does not fit float32: use checkpoint_dtype = "float64"'
    with pytest.raises(PrecisionError, match=expected.replace("+", r"\+")):
        pool.write(slot, state, 0, 0.0)


def test_after_a_value_that_did_not_fit_the_pool_works_on(new_pool: NewPool) -> None:
    pool = new_pool(4, "float32")
    for _ in range(STAGING_BUFFERS + 1):
        slot = pool.acquire()
        with pytest.raises(PrecisionError):
            pool.write(slot, np.array([0.0, 1e39, 0.0, 0.0]), 0, 0.0)
        pool.release(slot)
    assert round_trip(pool, np.ones(4))[0].tolist() == [1.0] * 4


def test_a_disk_slot_whose_last_write_did_not_fit_is_not_read_as_the_one_before(tmp_path: Path) -> None:
    pool = SpillPool(1, np.dtype("float32"), tmp_path, 0)
    slot = pool.acquire()
    pool.write(slot, np.array([1.0]), 0, 0.0)
    settle(pool)
    with pytest.raises(PrecisionError):
        pool.write(slot, np.array([1e39]), 1, 0.0)
    with pytest.raises(SpillError, match="does not fit float32"):
        pool.read(slot, np.empty(1))


def test_a_pool_works_again_when_its_directory_is_back(tmp_path: Path) -> None:
    place = tmp_path / "scratch"
    pool = SpillPool(2, np.dtype("float64"), place, 0)
    slots = [pool.acquire() for _ in range(2)]
    for slot in slots:
        pool.write(slot, np.ones(2), 3, 0.0)
        settle(pool)
        with pytest.raises(SpillError, match="checkpoint of step 3 could not be written: No such file or directory"):
            pool.read(slot, np.empty(2))
        pool.release(slot)
    place.mkdir()
    assert round_trip(pool, np.array([1.0, 2.0]))[0].tolist() == [1.0, 2.0]
    assert len(list(place.rglob("*.h5"))) == 1
    del pool
    assert list(place.iterdir()) == []


def test_the_largest_float32_fits(new_pool: NewPool) -> None:
    largest = float(np.finfo(np.float32).max)
    assert round_trip(new_pool(2, "float32"), np.array([largest, -largest]))[0].tolist() == [largest, -largest]


def test_entries_that_are_not_finite_are_kept_and_do_not_hide_one_that_does_not_fit(new_pool: NewPool) -> None:
    state = np.array([np.nan, np.inf, -np.inf, 0.1])
    pool = new_pool(4, "float32")
    found, rounding = round_trip(pool, state)
    assert np.array_equal(found, [np.nan, np.inf, -np.inf, np.float64(np.float32(0.1))], equal_nan=True)
    assert 0.0 < rounding <= HALF_UNIT
    state[3] = 1e39
    with pytest.raises(PrecisionError):
        pool.write(pool.acquire(), state, 0, 0.0)


def test_rounding_disregards_how_the_program_treats_floating_point_errors() -> None:
    with np.errstate(all="raise"):
        assert copy_rounded(np.array([1e-300, 1.0]), np.empty(2, dtype=np.float32)) == 1e-300
        with pytest.raises(PrecisionError):
            copy_rounded(np.array([1e300]), np.empty(1, dtype=np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_rank_without_entries_has_empty_checkpoints(new_pool: NewPool, dtype: str) -> None:
    found, rounding = round_trip(new_pool(0, dtype), np.empty(0))
    assert (found.size, rounding) == (0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_timing_slots_leaves_the_state_as_it_is(new_pool: NewPool, state: State, dtype: str) -> None:
    before = state.copy()
    assert all(seconds > 0 for seconds in new_pool(SIZE, dtype).seconds(state))
    assert bits(state) == bits(before)


def test_checkpoints_count_the_bytes_they_are_told_and_the_largest_rounding(tmp_path: Path) -> None:
    statistics = SolveStatistics()
    dtype = np.dtype("float32")
    pools: dict[Tier, SlotPool] = {Tier.RAM: MemoryPool(2, dtype), Tier.DISK: SpillPool(2, dtype, tmp_path, 0)}
    checkpoints = Checkpoints(pools, 8, statistics)
    roundings = []
    for step, (tier, value) in enumerate([(Tier.RAM, 0.7), (Tier.DISK, 0.1), (Tier.RAM, 0.5)]):
        checkpoints.store(step, tier, np.array([value, 1.0]), 0.0)
        roundings.append(abs(float(np.float32(value)) - value))
        assert statistics.largest_rounding == max(roundings)
    assert roundings[1] != max(roundings) > roundings[2] == 0.0
    found = np.empty(2)
    checkpoints.restore(1, found, discard=True)
    assert found.tolist() == [float(np.float32(0.1)), 1.0]
    assert (statistics.bytes_written, statistics.bytes_read, statistics.checkpoint_bytes_peak) == (8, 8, 24)


def test_a_checkpoint_that_moves_from_memory_to_disk_is_rounded_once(tmp_path: Path, state: State) -> None:
    dtype = np.dtype("float32")
    pools: dict[Tier, SlotPool] = {Tier.RAM: MemoryPool(SIZE, dtype), Tier.DISK: SpillPool(SIZE, dtype, tmp_path, 0)}
    statistics = SolveStatistics()
    checkpoints = Checkpoints(pools, 4 * SIZE, statistics)
    checkpoints.store(3, Tier.RAM, state, 0.5)
    rounding = statistics.largest_rounding
    checkpoints.spill(3)
    settle(pools[Tier.DISK])
    found = np.empty(SIZE)
    checkpoints.restore(3, found, discard=False)
    assert np.array_equal(found, state.astype(np.float32).astype(np.float64))
    assert statistics.largest_rounding == rounding


def test_of_several_solves_the_largest_rounding_counts_and_everything_else_adds_up() -> None:
    first = SolveStatistics(forward_steps=2, checkpoint_bytes_peak=10, largest_rounding=3e-8)
    second = SolveStatistics(forward_steps=3, checkpoint_bytes_peak=20, largest_rounding=1e-8)
    for total in (first + second, second + first):
        assert total == SolveStatistics(forward_steps=5, checkpoint_bytes_peak=30, largest_rounding=3e-8)


@pytest.mark.parametrize("slots", [{"ram_slots": 2}, {"ram_slots": 0, "disk_slots": 2}])
def test_a_solve_tells_how_much_its_checkpoints_were_rounded(slots: dict[str, int], tmp_path: Path) -> None:
    gradients, roundings = [], []
    for dtype in ("float64", "float32"):
        torch.manual_seed(0)
        trajectory = Trajectory(**slots, directory=tmp_path, checkpoint_dtype=dtype)  # type: ignore[arg-type]
        node = NeuralODE(Network(), step_size=0.05, trajectory=trajectory)
        u0 = random(2, 3).requires_grad_()
        (gradient,) = torch.autograd.grad(node(u0, [0.0, 1.0])[-1].square().sum(), u0)
        gradients.append(gradient)
        roundings.append(node.last_solve.largest_rounding)
    assert roundings[0] == 0.0
    assert 0.0 < roundings[1] <= HALF_UNIT
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slots", [{"ram_slots": 2}, {"ram_slots": 0, "disk_slots": 2}])
def test_a_solve_whose_state_outgrows_float32_ends_with_what_to_do(slots: dict[str, int], tmp_path: Path) -> None:
    u0 = torch.full((3,), 1e37, dtype=torch.float64, requires_grad=True)
    trajectory = Trajectory(**slots, directory=tmp_path, checkpoint_dtype="float32")  # type: ignore[arg-type]
    with pytest.raises(PrecisionError, match='does not fit float32: use checkpoint_dtype = "float64"'):
        odeint(lambda t, u: 20 * u, u0, [0.0, 1.0], step_size=0.05, trajectory=trajectory).sum().backward()
