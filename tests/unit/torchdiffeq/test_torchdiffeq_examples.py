"""The programs in examples/coming_from_torchdiffeq/ give the results that they give with torchdiffeq's import line."""

from __future__ import annotations

import re
import runpy
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
NAMES = ["bouncing_ball", "flow", "hidden_physics", "latent_ode", "spiral"]
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


@pytest.mark.parametrize("name", at_night(NAMES, ["bouncing_ball", "flow"]))
def test_a_program_prints_what_it_has_learnt(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    if name == "bouncing_ball":
        first, last, gravity, restitution = numbers
        assert last < first / 50
        assert gravity == pytest.approx(9.81, rel=0.05)
        assert restitution == pytest.approx(0.8, rel=0.05)
    elif name == "hidden_physics":
        first, last, stiffness, damping = numbers
        assert last < first / 50
        assert stiffness == pytest.approx(4.0, rel=0.05)
        assert damping == pytest.approx(0.3, rel=0.15)
    else:
        assert len(numbers) in (3, 5)
        assert min(numbers[1:]) < numbers[0]


def test_every_program_is_run() -> None:
    assert {path.stem for path in PROGRAMS.glob("*.py")} == set(NAMES)
