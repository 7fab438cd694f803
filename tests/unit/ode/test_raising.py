"""A right-hand side that raises: its error comes through, and nothing stays behind, whichever evaluation it is."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from pnode_dist import odeint
from pnode_dist.bench.methods.heap import bytes_in_use
from tests.tiers import at_night

METHODS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "step_size": 0.5},
    "dopri5": {"method": "dopri5", "rtol": 1e-2},
    "ssp": {"method": "ssp_rks2", "step_size": 0.5},
    "cn": {"method": "cn", "step_size": 0.5},
    "cn adaptive": {"method": "cn", "rtol": 1e-2},
    "arkimex": {"method": "arkimex_3", "step_size": 0.5},
    "dirk": {"method": "dirk_es213sal", "step_size": 0.5},
    "dirk adaptive": {"method": "dirk_es213sal", "rtol": 1e-2},
    "dirk s": {"method": "dirk_s212", "step_size": 0.5},
    "irk": {"method": "radau3", "step_size": 0.5, "newton": "petsc"},
    "rosw": {"method": "rosw_ra34pw2", "step_size": 0.5},
    "bdf": {"method": "bdf", "step_size": 0.25},
}
WITHOUT_ADJOINT = ("ssp", "rosw", "bdf")
ENTRIES = 4096


class Raising:
    """du/dt = -w u, whose evaluation with this number raises."""

    def __init__(self, number: int, w: torch.Tensor) -> None:
        self.number, self.w, self.seen, self.error = number, w, 0, ArithmeticError()

    def __call__(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        if self.seen == self.number:
            raise self.error
        return -self.w * u


@pytest.mark.parametrize("number", at_night([1, 2, 3, 4], but=[1, 3]))
@pytest.mark.parametrize("name", METHODS)
def test_the_error_comes_through_and_no_memory_stays(name: str, number: int) -> None:
    w = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=name not in WITHOUT_ADJOINT)
    u0 = torch.ones(ENTRIES, dtype=torch.float64)

    def fail() -> None:
        func = Raising(number, w)
        with pytest.raises(ArithmeticError) as caught:
            odeint(func, u0, [0.0, 1.0], **METHODS[name])
        assert caught.value is func.error
        assert func.seen == number

    calls = 12
    for _ in range(3):
        fail()
    gc.collect()
    before = bytes_in_use()
    for _ in range(calls):
        fail()
    gc.collect()
    # A state has 32 KiB.
    assert (bytes_in_use() - before) / calls < 8 * ENTRIES / 8


@pytest.mark.parametrize("name", METHODS)
def test_a_solve_after_an_error_is_right(name: str) -> None:
    w = torch.full((1,), 0.5, dtype=torch.float64)
    u0 = torch.ones(3, dtype=torch.float64)
    wanted = odeint(Raising(0, w), u0, [0.0, 1.0], **METHODS[name])
    with pytest.raises(ArithmeticError):
        odeint(Raising(2, w), u0, [0.0, 1.0], **METHODS[name])
    assert torch.equal(odeint(Raising(0, w), u0, [0.0, 1.0], **METHODS[name]), wanted)
