"""The learnt convection of the semilinear problems: that of plain torch, from its seed alone, keeping the mean."""

from typing import Any

import pytest
import torch
from mpi4py import MPI

from pnode_dist.problems.semilinear.config import SemilinearModelConfig
from pnode_dist.problems.semilinear.model import LearntConvection, learnt_convection
from pnode_dist.problems.semilinear.periodic_line import line
from tests.unit.problems.semilinear.plain_semilinear import CASES, POINTS, term

SCALE = 0.7


def built(
    dtype: torch.dtype = torch.float64, seed: int = 0, length: float = 1.0, kernel_size: int = 3, layers: int = 3
) -> LearntConvection:
    model = SemilinearModelConfig(channels=6, layers=layers, kernel_size=kernel_size, activation="tanh")
    return learnt_convection(line(MPI.COMM_SELF, POINTS), length, SCALE, model, dtype, seed)


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_term_is_that_of_plain_torch(name: str, layers: int) -> None:
    module = built(layers=layers, length=CASES[name]["length"])
    state = torch.randn(4, POINTS, 1, dtype=torch.float64)
    found = module(torch.tensor(0.0), state)
    expected = term(name, dict(module.named_parameters()), SCALE, state[..., 0])
    torch.testing.assert_close(found[..., 0], expected, rtol=1e-11, atol=1e-13)
    assert sum("weight" in key for key, _ in module.named_parameters()) == layers


def test_the_term_keeps_the_mean_and_shifts_with_the_state() -> None:
    module = built(kernel_size=5)
    state = torch.randn(POINTS, 1, dtype=torch.float64)
    rate = module(torch.tensor(0.0), state)
    assert abs(rate.sum().item()) < 1e-12 * rate.abs().sum().item()
    torch.testing.assert_close(module(torch.tensor(0.0), state.roll(7, -2)), rate.roll(7, -2), rtol=1e-12, atol=1e-13)


def test_seed_alone_fixes_the_parameters_in_every_precision() -> None:
    def values(**changes: Any) -> torch.Tensor:
        return torch.cat([value.detach().flatten() for value in built(**changes).parameters()])

    before = torch.random.get_rng_state()
    double = values(seed=0)
    assert torch.equal(values(seed=0), double)
    assert torch.equal(values(seed=0, dtype=torch.float32), double.float())
    assert not torch.equal(values(seed=1), double)
    assert torch.equal(torch.random.get_rng_state(), before)
