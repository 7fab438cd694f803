"""The learnt right-hand side: that of plain torch, the same from the same seed in every precision, gentle at first."""

import pytest
import torch

from pnode_dist import GridPartition, Mesh, NeuralODE
from pnode_dist.problems.gray_scott.model import right_hand_side
from pnode_dist.problems.gray_scott.physics import initial_state
from tests.unit.problems.gray_scott.plain_gray_scott import NX, NY, tendency


def grid(mesh: Mesh) -> GridPartition:
    return GridPartition(mesh, (NY, NX), 2, ("periodic", "periodic"))


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_the_tendency_is_that_of_plain_torch(mesh: Mesh, layers: int) -> None:
    rate = torch.tensor([0.5, 2.0], dtype=torch.float64)
    module = right_hand_side(grid(mesh), 6, layers, torch.float64, "tanh", rate)
    state = torch.randn(3, NY, NX, 2, dtype=torch.float64)
    found = module(torch.tensor(0.0), state)
    torch.testing.assert_close(found, tendency(dict(module.named_parameters()), rate, state), rtol=1e-12, atol=1e-14)
    assert sum("weight" in name for name, _ in module.named_parameters()) == layers


def test_seed_alone_fixes_the_parameters_in_every_precision(mesh: Mesh) -> None:
    def values(seed: int, dtype: torch.dtype) -> torch.Tensor:
        module = right_hand_side(grid(mesh), dtype=dtype, seed=seed)
        return torch.cat([value.detach().flatten() for value in module.parameters()])

    before = torch.random.get_rng_state()
    double = values(0, torch.float64)
    assert torch.equal(values(0, torch.float64), double)
    assert torch.equal(values(0, torch.float32), double.float())
    assert not torch.equal(values(1, torch.float64), double)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_state_without_data_can_be_solved_for(mesh: Mesh) -> None:
    partition = grid(mesh)
    initial = initial_state(partition, seed=0)
    node = NeuralODE(right_hand_side(partition, 8, 3, torch.float64), step_size=0.5, partition=partition)
    states = node(initial, [0.0, 1.0])
    assert states.shape == (2, NY, NX, 2)
    assert 0 < (states[1] - initial).abs().max() < 1
