"""torchdiffeq's names mean torchdiffeq's methods, or are refused with what to use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq

from pnode_dist import ConfigurationError
from pnode_dist.ode import methods as native
from pnode_dist.torchdiffeq import odeint
from pnode_dist.torchdiffeq.methods import METHODS, REFUSED, named
from tests.oracles.right_hand_sides import Network, distance, gradients, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain
from tests.unit.torchdiffeq.recorded import Recorded

TIMES = torch.tensor([0.0, 0.4, 1.0, 2.5], dtype=torch.float64)
EXPLICIT = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAPTIVE = ["dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun"]
# Names of the development version.
LATER = ["tsit5", "implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "radauIIA5", "gl6", "sdirk2"]


def quarters(func: Any, y0: Any, t: torch.Tensor) -> torch.Tensor:
    # Not the times of t, also backward in time.
    return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * torch.tensor([0.25, 0.5, 0.75], dtype=t.dtype), t[-1:]])


def test_every_name_of_torchdiffeq_is_a_method_here_or_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid method") as caught:
        torchdiffeq.odeint(Network(), random(2, 3), TIMES, method="none of them")
    names = re.findall(r'"(\w+)"', str(caught.value))
    assert len(names) >= 14
    for name in (*names, *LATER, "trbdf2"):
        assert (name in METHODS) != (name in REFUSED), name
    assert all(method.native in native.METHODS for method in METHODS.values())
    assert {name for name, method in METHODS.items() if method.adaptive} == {*ADAPTIVE, "tsit5"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_method_is_answered_with_one_that_exists(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"method = '{name}': ") as caught:
        odeint(Network(), random(2, 3), TIMES, method=name)
    message = str(caught.value)
    assert "\n" not in message
    instead = re.findall(r"'(\w+)'", message.partition(" use ")[2])
    assert instead
    known = native.METHODS if "pnode_dist.odeint" in message else METHODS
    assert all(other in known for other in instead)


def test_an_unknown_method_is_answered_with_all_names() -> None:
    with pytest.raises(
        ConfigurationError, match=r"'dopri6' \(did you mean 'dopri\d'\?\): must be one of dopri8, dopri5"
    ):
        named("dopri6")


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        None,
        {"step_size": 0.3},
        {"step_size": 0.3, "interp": "cubic"},
        {"grid_constructor": quarters, "interp": "cubic"},
    ],
    ids=["times", "step_size", "cubic", "grid_constructor"],
)
@pytest.mark.parametrize("method", EXPLICIT)
def test_given_steps_and_their_gradients_are_torchdiffeq_s_to_rounding(
    method: str, options: dict[str, Any] | None, decreasing: bool
) -> None:
    network, u0 = Network(), random(2, 3)
    times = TIMES.flip(0) if decreasing else TIMES

    def solved(solver: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        t = times.clone().requires_grad_()
        parameters = [*network.parameters(), t]
        return gradients(lambda u: solver(network, u, t, method=method, options=options), u0, parameters)

    assert distance(solved(odeint), solved(torchdiffeq.odeint)) < 1e-12


@pytest.mark.parametrize(
    ("method", "growth"),
    [
        ("implicit_euler", lambda z: 1 / (1 - z)),
        ("implicit_midpoint", lambda z: (1 + z / 2) / (1 - z / 2)),
        ("trapezoid", lambda z: (1 + z / 2) / (1 - z / 2)),
        # R(z) of TR-BDF2 and of Alexander's method, with g = 1 - 1 / sqrt(2).
        ("sdirk2", lambda z, g=1 - 2**-0.5: (1 + (1 - 2 * g) * z) / (1 - g * z) ** 2),
        # Pade approximations of the exponential function.
        ("gl4", lambda z: (1 + z / 2 + z**2 / 12) / (1 - z / 2 + z**2 / 12)),
        ("gl6", lambda z: (1 + z / 2 + z**2 / 10 + z**3 / 120) / (1 - z / 2 + z**2 / 10 - z**3 / 120)),
        ("radauIIA3", lambda z: (1 + z / 3) / (1 - 2 * z / 3 + z**2 / 6)),
        ("radauIIA5", lambda z: (1 + 2 * z / 5 + z**2 / 20) / (1 - 3 * z / 5 + 3 * z**2 / 20 - z**3 / 60)),
        ("trbdf2", lambda z, g=1 - 2**-0.5: (1 + (1 - 2 * g) * z) / (1 - g * z) ** 2),
    ],
)
def test_an_implicit_step_multiplies_by_the_stability_function(method: str, growth: Callable[[float], float]) -> None:
    u0 = torch.ones(1, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    end = odeint(lambda t, u: -3.0 * u, u0, t, method=method, options={"step_size": 0.25})[-1]
    assert distance(end, u0 * growth(-0.75) ** 2) < 1e-7


def test_a_step_of_tsit5_is_that_of_its_tableau() -> None:
    network, u0, t = Network(), random(2, 3), torch.tensor([0.0, 0.5], dtype=torch.float64)
    options = dict.fromkeys(("first_step", "min_step", "max_step"), 0.125)
    found = odeint(network, u0, t, method="tsit5", options=options, rtol=1e-13, atol=1e-13)
    assert distance(found, odeint_plain(network, u0, t, TABLEAUX["5ts"], 0.125)) < 1e-14


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_control_ends_within_the_tolerance_of_torchdiffeq(method: str, decreasing: bool) -> None:
    network, u0 = Network(), random(2, 3)
    times = TIMES.flip(0) if decreasing else TIMES
    tolerances = {"rtol": 1e-7, "atol": 1e-9} if method in ("dopri8", "dopri5") else {"rtol": 1e-4, "atol": 1e-6}
    # torchdiffeq interpolates between steps, with an error that it does not control: let it step to the times too.
    options = {"step_t": times[1:]}
    wanted = torchdiffeq.odeint(network, u0, times, method=method, options=options, **tolerances)
    found = odeint(network, u0, times, method=method, **tolerances)
    # fehlberg2 controls the error of its first-order result.
    assert distance(found, wanted) < tolerances["rtol"] * (512 if method == "fehlberg2" else 10)


@pytest.mark.parametrize("method", ["dopri8", "dopri5", "bosh3"])
def test_steps_have_the_sizes_of_torchdiffeq_until_the_end_is_near(method: str) -> None:
    ours, theirs = Recorded(), Recorded()
    t = torch.tensor([0.0, 30.0], dtype=torch.float64)
    # Errors well above rounding, from the first step on.
    settings = {"method": method, "rtol": 1e-4, "atol": 1e-5, "options": {"first_step": 1.0}}
    odeint(ours, random(2, 3), t, **settings)
    torchdiffeq.odeint(theirs, random(2, 3), t, **settings)
    # The last two steps are equal here, and the last one there is past the end.
    same = len(ours.taken) - 2
    assert same >= 6
    torch.testing.assert_close(torch.tensor(ours.taken[:same]), torch.tensor(theirs.taken[:same]), rtol=1e-6, atol=0)
