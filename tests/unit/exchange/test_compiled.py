"""The operation that stands for exchanges in compiled code, without other ranks."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch

from pnode_dist import DensePartition, GridPartition, Mesh
from pnode_dist.exchange import compiled, halo
from pnode_dist.exchange.compiled import number_of, ordered_exchange
from pnode_dist.system.compile_order import rehearsal
from tests.oracles.right_hand_sides import random

TOKEN = torch.zeros(1)


class Owner:
    """An object whose map doubles rows: `[rows, n]` to `[2 rows, n]`."""

    def number(self) -> int:
        return number_of(
            self, "twice", lambda x, _: torch.cat([x, x]), lambda y, _: y[: len(y) // 2] + y[len(y) // 2 :]
        )


@pytest.mark.slow
def test_the_operation_passes_torch_s_checks_of_operations() -> None:
    owner = Owner()
    x = random(3, 2).requires_grad_()
    torch.library.opcheck(ordered_exchange, (x, TOKEN, owner.number(), False, [6, 2]))
    torch.library.opcheck(ordered_exchange, (random(6, 2).mT.contiguous().mT, TOKEN, owner.number(), True, [3, 2]))
    token = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ordered_exchange(x, token, owner.number(), False, [6, 2])[0], x)
    assert torch.autograd.gradgradcheck(lambda x: ordered_exchange(x, token, owner.number(), False, [6, 2])[0] ** 2, x)


def test_a_number_whose_owner_no_longer_exists_is_refused() -> None:
    owner = Owner()
    number = owner.number()
    assert owner.number() == number
    del owner
    gc.collect()
    with pytest.raises(RuntimeError, match=f"exchange {number} in compiled code: its partition, mesh or communicator"):
        ordered_exchange(random(3, 2), TOKEN, number, False, [6, 2])
    other = Owner()
    assert other.number() > number


def test_numbers_of_partitions_are_freed_with_them() -> None:
    before = len(compiled._maps), len(compiled._numbers)
    with Mesh() as mesh:
        partition = DensePartition(mesh, 3)
        number_of(partition, "a map", torch.add, torch.add)
        assert len(compiled._maps) == before[0] + 1
        del partition
        gc.collect()
    assert (len(compiled._maps), len(compiled._numbers)) == before


def test_a_result_of_another_shape_than_compiled_for_is_refused() -> None:
    owner = Owner()
    with pytest.raises(RuntimeError, match=r"got \(6, 2\) of torch.float64, compiled for \(5, 2\) of torch.float64"):
        ordered_exchange(random(3, 2), TOKEN, owner.number(), False, [5, 2])


def test_a_rehearsed_exchange_returns_zeros_without_its_owner() -> None:
    with rehearsal():
        image, _ = ordered_exchange(random(3, 2), TOKEN, 10**9, False, [6, 2])
    assert torch.equal(image, torch.zeros(6, 2, dtype=torch.float64))


@pytest.mark.slow
def test_an_older_torch_separates_compiled_pieces_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from pnode_dist.exchange import grid_halo, linear_map

    monkeypatch.setattr(compiled, "TRACES_OBJECTS", False)
    outside = linear_map._outside_graphs(grid_halo._surrounded_outside_graphs)
    monkeypatch.setattr(grid_halo, "_surrounded_outside_graphs", outside)
    compiled._warn_of_old_torch.cache_clear()
    torch.compiler.reset()
    pieces: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        pieces.append(graph)
        return graph.forward

    with Mesh() as mesh, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partition = GridPartition(mesh, (4, 5), boundary="periodic")
        x = random(4, 5, 1).requires_grad_()

        def function(x: torch.Tensor) -> torch.Tensor:
            return halo(halo(x.sin(), partition)[1:-1, 1:-1].cos(), partition)

        code = torch.compile(function, backend=backend)
        found, wanted = code(x), function(x)
        code(x + 1)
        assert torch.equal(found, wanted)
        weight = random(*wanted.shape)
        assert torch.equal(*(torch.autograd.grad(y, x, weight)[0] for y in (found, wanted)))
    assert len(pieces) == 2
    messages = [str(warning.message) for warning in caught if "cannot compile exchanges" in str(warning.message)]
    assert len(messages) == 1
    compiled._warn_of_old_torch.cache_clear()
    torch.compiler.reset()
