"""Python collects no garbage while PETSc returns from a callback that has raised, and goes on afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from pnode_dist import odeint
from pnode_dist.petsc import unwinding


@pytest.fixture(autouse=True)
def _collection() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.enable()


def test_collection_pauses_from_the_error_to_the_return() -> None:
    error = ArithmeticError()
    assert unwinding.begin(error) is error
    assert not gc.isenabled()
    unwinding.end()
    assert gc.isenabled()


def test_collection_that_a_program_has_turned_off_stays_off() -> None:
    gc.disable()
    unwinding.begin(ArithmeticError())
    unwinding.end()
    assert not gc.isenabled()


@pytest.mark.parametrize(("method", "newton"), [("bdf", "auto"), ("cn", "petsc"), ("ssp_rks2", "auto")])
def test_a_solve_that_raises_ends_with_its_error_amid_many_collections(method: str, newton: str) -> None:
    evaluations = 0

    def raising(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        if evaluations % 3 == 0:
            raise ArithmeticError
        return -u

    u0 = torch.ones(2, dtype=torch.float64)
    gc.set_threshold(20)
    for _ in range(10):
        evaluations = 0
        with pytest.raises(ArithmeticError):
            odeint(raising, u0, [0.0, 1.0], method=method, step_size=0.25, newton=newton)
        assert gc.isenabled()
