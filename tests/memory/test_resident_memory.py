"""Resident memory does not grow with the number of solves: every family of methods, on one rank and on two."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pnode_dist.ode.methods import METHODS
from tests.tiers import at_night

PROGRAM = Path(__file__).with_name("resident_memory.py")
FAMILIES = {
    "rk": ["rk4", "dopri5+adaptive", "rk4+raises"],
    "theta": ["cn", "cn+adaptive", "cn+raises"],
    "arkimex": ["arkimex_3", "arkimex_3+adaptive", "arkimex_3+raises"],
    "dirk": ["dirk_es213sal", "dirk_es213sal+adaptive", "dirk_es213sal+raises"],
    "irk": ["radau3", "radau3+raises"],
    "rosw": ["rosw_ra34pw2", "rosw_ra34pw2+adaptive"],
    "bdf": ["bdf"],
    "ssp": ["ssp_rks2", "ssp_rks2+raises"],
    "symplectic": ["leapfrog", "leapfrog+raises"],
}
LIMIT = 1.0
# A leak of one state in every call is six times the limit after 200 calls.
ENTRIES = 4096

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def measured(mpirun: Run, ranks: int, calls: int, cases: list[str]) -> dict[str, float]:
    """The growth in MiB by case."""
    finished = mpirun(
        ranks, "python", str(PROGRAM), str(calls), str(ENTRIES), *cases, timeout=3000, OMP_NUM_THREADS="1"
    )
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line["MiB"] for line in lines}


def test_every_family_of_methods_is_measured() -> None:
    assert set(FAMILIES) == {method.family for method in METHODS.values()}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", at_night([1, 2], but=[2]))
def test_resident_memory_is_flat_over_300_calls(mpirun: Run, ranks: int) -> None:
    cases = ["dopri5+adaptive", "cn", "rosw_ra34pw2"]
    growth = measured(mpirun, ranks, 300, cases)
    assert set(growth) == set(cases)
    assert {case: grown for case, grown in growth.items() if grown > LIMIT} == {}


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_resident_memory_is_flat_over_2000_calls(mpirun: Run, family: str, ranks: int) -> None:
    growth = measured(mpirun, ranks, 2000, FAMILIES[family])
    assert set(growth) == set(FAMILIES[family])
    assert {case: grown for case, grown in growth.items() if grown > LIMIT} == {}
