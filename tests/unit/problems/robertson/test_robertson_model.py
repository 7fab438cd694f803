"""The learnt rates of the Robertson problem: those of plain torch in physical time, gentle at first."""

import math

import pytest
import torch

from pnode_dist import BatchPartition, Mesh, NeuralODE
from pnode_dist.problems.common.forecast_data import Samples, windows
from pnode_dist.problems.robertson.config import RobertsonModelConfig
from pnode_dist.problems.robertson.model import LogTimeRate, RobertsonModel, right_hand_side
from tests.unit.problems.robertson.plain_robertson import slope

RATE = torch.tensor([0.5, 3e3, 0.2], dtype=torch.float64)


def built(seed: int = 0, activation: str = "tanh", rate: torch.Tensor = RATE) -> LogTimeRate:
    model = RobertsonModelConfig.model_validate({"hidden": (6, 5), "activation": activation, "bias": True})
    return right_hand_side(model, rate, (1.0, 60.0, 100.0), seed)


def test_only_what_changes_in_much_less_than_the_longest_interval_relaxes() -> None:
    assert built().fast.tolist() == [0.0, 1.0, 0.0]
    assert built(rate=RATE / 1e3).fast.tolist() == [0.0, 1.0, 0.0]
    assert built(rate=RATE / 2e3).fast.tolist() == [0.0, 0.0, 0.0]


def test_the_slope_is_that_of_physical_time_times_the_change_of_time() -> None:
    module, state = built(), torch.rand(2, 4, 3, dtype=torch.float64)
    begin = torch.tensor([1e-3, 5.0], dtype=torch.float64)[:, None, None]
    found = module(torch.tensor(0.25, dtype=torch.float64), state, begin)
    expected = slope(dict(module.named_parameters()), RATE, state)
    for number, time in enumerate(begin.flatten().tolist()):
        change = math.log(10) * time * 10**0.25
        torch.testing.assert_close(found[number], change * expected[number], rtol=1e-12, atol=0)


def test_windows_that_begin_at_different_times_are_solved_as_by_themselves(mesh: Mesh) -> None:
    times = torch.tensor([1e-2, 1e-1, 1.0], dtype=torch.float64)
    partition = BatchPartition(mesh, 4, (3,))
    samples = Samples(partition, torch.rand(1, 3, 4, 3, dtype=torch.float64), times)
    node = NeuralODE(built(), method="cn", partition=partition, preconditioner="block")
    model = RobertsonModel(node, 1.0)
    starts = [(0, 1), (0, 0)]
    with torch.no_grad():
        together = model(windows(samples, starts, 1, torch.float64))
        for number, start in enumerate(starts):
            alone = model(windows(samples, [start], 1, torch.float64))
            torch.testing.assert_close(together[:, number : number + 1], alone, rtol=1e-7, atol=1e-9)


def test_the_solution_in_log_time_is_that_in_physical_time(mesh: Mesh) -> None:
    mild = torch.tensor([1.0, 5.0, 1.0], dtype=torch.float64)
    module, partition = built(rate=mild), BatchPartition(mesh, 2, (3,))
    module.fast.copy_(torch.tensor([0.0, 1.0, 0.0]))
    initial = torch.rand(1, 2, 3, dtype=torch.float64)
    begin = torch.full((1, 1, 1), 0.1, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        in_log = NeuralODE(module, rtol=1e-10, atol=1e-12, partition=partition)(initial, [0.0, 1.0], begin)
        physical = NeuralODE(lambda t, w: slope(parameters, mild, w), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(in_log[-1], physical(initial, [0.1, 1.0])[-1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_fast_species_decay_in_an_untrained_model(seed: int) -> None:
    module, state = built(seed), torch.rand(20, 3, dtype=torch.float64)
    begin, now = torch.ones(1, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for mixture in state:
        jacobian = torch.autograd.functional.jacobian(lambda w: module(now, w[None], begin)[0], mixture)
        growth = torch.linalg.eigvals(jacobian).real
        # No faster growth than that of the slow species; the fast one follows the others.
        assert growth.min() < -0.5 * RATE[1]
        assert growth.max() < RATE[0]


def test_seed_alone_fixes_the_parameters() -> None:
    first, again, other = (torch.cat([p.flatten() for p in built(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
