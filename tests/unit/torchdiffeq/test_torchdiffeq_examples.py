"""The programs in examples/coming_from_torchdiffeq/ give the results that they give with torchdiffeq's import line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq

from tests.conftest import ROOT
from tests.oracles.right_hand_sides import distance
from tests.tiers import at_night

pytestmark = pytest.mark.slow
PROGRAMS = ROOT / "examples/coming_from_torchdiffeq"
NAMES = ["flow", "hidden_physics", "latent_ode", "spiral"]
OURS, THEIRS = "from pnode_dist.torchdiffeq import", "from torchdiffeq import"


def trained(source: str, odeint: Callable[..., Any] | None = None) -> tuple[list[float], list[torch.Tensor]]:
    """Run two iterations. Returns the losses, and the gradients of the last one. `odeint` replaces the imported one."""
    program: dict[str, Any] = {"__name__": "program"}
    exec(compile(source, "program", "exec"), program)
    if odeint is not None:
        program["odeint"] = odeint
    losses, model = program["train"](2)
    return losses, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", at_night(NAMES, ["flow", "latent_ode"]))
def test_a_program_runs_with_the_import_line_alone_changed(name: str) -> None:
    source = (PROGRAMS / f"{name}.py").read_text()
    assert source.count(OURS) == 1
    theirs = source.replace(OURS, THEIRS)
    losses, gradients = trained(source)
    assert losses == pytest.approx(trained(theirs)[0], rel=1e-5)

    # At its default tolerances torchdiffeq's own gradients are off by up to 2e-4.
    def precise(*args: Any, **settings: Any) -> Any:
        return torchdiffeq.odeint(*args, **{**settings, "rtol": 1e-9, "atol": 1e-11})

    for found, wanted in zip(gradients, trained(theirs, precise)[1], strict=True):
        assert distance(found, wanted) < 1e-5


def test_every_program_is_run() -> None:
    assert {path.stem for path in PROGRAMS.glob("*.py")} == set(NAMES)
