"""Robertson's reactions and their accurate solution."""

import numpy as np
import pytest

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.robertson.physics import initial_concentrations, reaction_jacobian, reaction_rates, reference
from tests.unit.problems.robertson.plain_robertson import RATES, by_radau, rates

MIXTURES = np.random.default_rng(0).uniform(0, 1, (7, 3)) * (1.0, 1e-4, 1.0)


def test_the_rates_are_the_sum_of_the_reactions() -> None:
    for mixture, found in zip(MIXTURES, reaction_rates(MIXTURES, RATES), strict=True):
        np.testing.assert_allclose(found, rates(mixture), rtol=1e-12, atol=1e-14)


def test_the_jacobian_is_that_of_complex_differences() -> None:
    step = 1e-30
    for mixture, found in zip(MIXTURES, reaction_jacobian(MIXTURES, RATES), strict=True):
        columns = [reaction_rates(mixture + 1j * step * unit, RATES).imag / step for unit in np.eye(3)]
        np.testing.assert_allclose(found, np.stack(columns, axis=-1), rtol=1e-12, atol=1e-9)


def test_the_solution_is_that_of_scipys_radau_for_every_trajectory() -> None:
    initial = np.stack([[1.0, 0.0, 0.0], *(initial_concentrations((0.5, 0, 0), (1, 5e-5, 0.5), 0, n) for n in (0, 1))])
    times = 10.0 ** np.array([-5.0, -3.0, -1.0, 0.5, 2.0])
    found = reference(initial, times, RATES)
    for number, start in enumerate(initial):
        np.testing.assert_allclose(found[:, number], by_radau(start, times), rtol=3e-8, atol=1e-14)


def test_the_solution_reaches_the_published_value_of_the_test_set() -> None:
    # F. Mazzia, C. Magherini: Test Set for IVP Solvers, release 2.4 (2008), problem ROBER, at t = 1e11.
    published = (0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050)
    ((found,),) = reference(np.array([[1.0, 0.0, 0.0]]), [1e11], RATES, (1e-14, 1e-19, 1e-11))
    np.testing.assert_allclose(found, published, rtol=1e-6)


def test_the_concentrations_add_up_to_what_was_there_at_first() -> None:
    initial = np.array([[0.7, 2e-5, 0.3]])
    found = reference(initial, [1e-3, 1.0, 100.0], RATES)
    np.testing.assert_allclose(found.sum(axis=-1), initial.sum(), rtol=1e-12)


def test_a_tighter_absolute_tolerance_changes_little() -> None:
    initial, times = np.array([[0.7, 2e-5, 0.3]]), [1e-5, 1e-2, 100.0]
    coarse, fine = reference(initial, times, RATES), reference(initial, times, RATES, (1e-13, 1e-17, 1e-13))
    np.testing.assert_allclose(coarse, fine, rtol=2e-8)


def test_seed_and_number_choose_the_initial_concentrations() -> None:
    low, high = (0.5, 0.0, 0.1), (1.0, 5e-5, 0.1)
    drawn = [initial_concentrations(low, high, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert all((mixture >= low).all() and (mixture <= high).all() for mixture in drawn)
    np.testing.assert_array_equal(drawn[0], initial_concentrations(low, high, 0, 0))


def test_reactions_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^\[problem\]: .* time 0: rates, highest or last is too large$"):
        reference(np.array([[1.0, 0.0, 0.0]]), [1.0], (1e300, 1e300, 1e300))
