"""The model of what halo exchanges cost, against times worked out by hand."""

import pytest

from pnode_dist.nn.halo_cost import ExchangeCost, fitted, seconds_apart, seconds_at_once

# 10 microseconds and 1 GB/s.
NETWORK = ExchangeCost(1e-5, 1e-9)


def test_two_exchanges_give_latency_and_bandwidth() -> None:
    found = fitted((1000, 1.1e-5), (5000, 1.5e-5))
    assert found.latency == pytest.approx(1e-5)
    assert found.seconds_per_byte == pytest.approx(1e-9)
    assert found.seconds(5000) == pytest.approx(1.5e-5)


def test_no_cost_is_ever_negative() -> None:
    # A larger exchange that happened to be faster, and one that takes as long as its bytes alone would.
    assert fitted((1000, 2e-5), (5000, 1e-5)) == ExchangeCost(2e-5, 0.0)
    assert fitted((1000, 1e-5), (3000, 5e-5)) == ExchangeCost(0.0, 2e-8)
    assert fitted((1000, 1e-5), (1000, 2e-5)) == ExchangeCost(1e-5, 0.0)


def test_an_exchange_of_nothing_is_free() -> None:
    assert NETWORK.seconds(0) == 0.0
    assert seconds_apart(NETWORK, [0, 1000, 0]) == pytest.approx(1.1e-5)


@pytest.mark.parametrize(("redundant", "pays"), [(1.9e-5, True), (2.1e-5, False)])
def test_a_wide_halo_pays_if_it_saves_more_latency_than_it_computes_again(redundant: float, pays: bool) -> None:
    # Three exchanges of 1000 bytes, or one of 3000: two latencies of 10 microseconds are saved.
    apart, together = seconds_apart(NETWORK, [1000] * 3), seconds_at_once(NETWORK, 3000, redundant)
    assert (together < apart) == pays
