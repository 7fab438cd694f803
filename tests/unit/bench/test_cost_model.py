"""Predictions against values computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from pnode_dist.bench.cost_model import CostModel, Exchanges, Network, Work

MODEL = CostModel(
    work=Work(((100, 1.0), (300, 2.0))),
    exchanges=Exchanges((8, 32), width=1),
    gradient_bytes=1000,
    network=Network(latency=0.5, bandwidth=100.0),
    contention=1.25,
    cores=2,
)


def test_a_message_takes_the_latency_and_the_time_of_its_bytes() -> None:
    assert MODEL.network.message(200) == 0.5 + 2.0


def test_work_is_linear_between_what_was_measured_and_proportional_beyond() -> None:
    assert [MODEL.work.seconds(points) for points in (10, 100, 150, 300, 600)] == [1.0, 1.0, 1.25, 2.0, 4.0]


def test_one_rank_works_alone() -> None:
    found = MODEL.predict((10, 30), (1, 1), one_node=True)
    assert (found.work, found.halo, found.gradient_sum, found.seconds) == (2.0, 0.0, 0.0, 2.0)


def test_two_ranks_exchange_two_messages_along_the_axis_that_is_split() -> None:
    found = MODEL.predict((10, 30), (2, 1), one_node=True)
    # Blocks of 150 points; rows of 30 points and a ghost at each end, 8 and 32 bytes a point.
    assert found.work == 1.25 * 1.25
    assert found.halo == pytest.approx(2 * (0.5 + 32 * 8 / 100) + 2 * (0.5 + 32 * 32 / 100))
    assert found.gradient_sum == 0.5 + 10.0
    assert found.seconds == found.work + found.halo + found.gradient_sum


def test_columns_are_exchanged_before_they_have_ghosts() -> None:
    found = MODEL.predict((10, 30), (2, 2), one_node=False)
    assert found.work == 1.25
    columns = 2 * (0.5 + 5 * 8 / 100) + 2 * (0.5 + 5 * 32 / 100)
    rows = 2 * (0.5 + 17 * 8 / 100) + 2 * (0.5 + 17 * 32 / 100)
    assert found.halo == pytest.approx(columns + rows)
    assert found.gradient_sum == 2 * 10.5


def test_more_ranks_than_cores_share_them_on_one_node_and_not_elsewhere() -> None:
    assert MODEL.predict((20, 30), (4, 1), one_node=True).work == 2 * 1.25 * 1.25
    assert MODEL.predict((20, 30), (4, 1), one_node=False).work == 1.25 * 1.25


def test_the_largest_block_counts_and_every_begun_doubling_of_the_ranks() -> None:
    found = MODEL.predict((1, 301), (1, 3), one_node=False)
    assert found.work == dataclasses.replace(MODEL, contention=1.0).work.seconds(101) * 1.25
    assert found.gradient_sum == 2 * 10.5


def test_work_on_a_block_of_three_axes() -> None:
    found = MODEL.predict((4, 5, 6), (1, 1, 2), one_node=False)
    assert found.halo == pytest.approx(2 * (0.5 + 20 * 8 / 100) + 2 * (0.5 + 20 * 32 / 100))
