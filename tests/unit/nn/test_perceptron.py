"""The perceptron: that of torch.nn, the same from the same seed in every precision."""

import pytest
import torch
from torch import nn

from pnode_dist.nn.perceptron import Perceptron

MODULES = {"gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_that_of_layers_in_a_row(activation: str, bias: bool) -> None:
    found = Perceptron((3, 5, 4, 2), activation, bias)
    plain = nn.Sequential()
    for layer in found.layers:
        plain.append(layer)
        plain.append(MODULES[activation]())
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(found(x), plain[:-1](x), rtol=1e-14, atol=0)
    sizes = [tuple(value.shape) for value in found.parameters()]
    biases = [(5,), (4,), (2,)] if bias else []
    assert sorted(sizes) == sorted([(5, 3), (4, 5), (2, 4), *biases])


def test_seed_alone_fixes_the_parameters_in_every_precision() -> None:
    def values(seed: int, dtype: torch.dtype) -> torch.Tensor:
        return nn.utils.parameters_to_vector(Perceptron((3, 4, 3), "tanh", seed=seed).to(dtype).parameters()).detach()

    before = torch.random.get_rng_state()
    double = values(0, torch.float64)
    assert torch.equal(values(0, torch.float64), double)
    assert torch.equal(values(0, torch.float32), double.float())
    assert not torch.equal(values(1, torch.float64), double)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_first_output_can_be_made_small() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    usual, small = (Perceptron((3, 8, 3), "gelu", first_output=factor)(x) for factor in (1.0, 0.1))
    torch.testing.assert_close(small, 0.1 * usual, rtol=1e-13, atol=1e-15)
