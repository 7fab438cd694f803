"""Interpolated inputs, against SciPy's interpolants and NumPy's, and their use in a solve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline, CubicSpline
from torch import nn

from pnode_dist import ConfigurationError, Forcing, NeuralODE, odeint
from tests.oracles.right_hand_sides import distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = np.array([0.0, 0.3, 0.7, 1.6, 2.0])
VALUES = random(5, 2)
INSIDE = torch.tensor([0.0, 0.1, 0.3, 0.65, 1.0, 1.9, 2.0], dtype=torch.float64)
PERIOD = 2.5


def oracle(kind: str, periodic: bool = False) -> Any:
    """The interpolant by SciPy or NumPy, of times inside the first period."""
    times, values = TIMES, VALUES.numpy()
    if periodic:
        times, values = np.append(times, times[0] + PERIOD), np.concatenate([values, values[:1]])
    if kind == "previous":
        return lambda t: values[np.searchsorted(times, t, side="right") - 1]
    if kind == "next":
        return lambda t: values[np.searchsorted(times, t)]
    if kind == "linear":
        return lambda t: np.stack([np.interp(t, times, column) for column in values.T], -1)
    if kind == "cubic":
        return CubicSpline(times, values, bc_type="periodic" if periodic else "natural")
    if periodic:
        # Three periods, of which the middle one has neighbours at both ends.
        times = np.concatenate([TIMES - PERIOD, TIMES, TIMES + PERIOD])
        values = np.concatenate([VALUES.numpy()] * 3)
    return CubicHermiteSpline(times, values, np.gradient(values, times, axis=0, edge_order=2))


def one_by_one(forcing: Forcing, times: torch.Tensor) -> torch.Tensor:
    return torch.stack([forcing(time) for time in times])


@pytest.mark.parametrize("periodic", [False, True], ids=["once", "periodic"])
@pytest.mark.parametrize("kind", ["previous", "next", "linear", "hermite", "cubic"])
def test_values_are_those_of_scipy_and_numpy(kind: str, periodic: bool) -> None:
    settings: dict[str, Any] = {"outside": "periodic", "period": PERIOD} if periodic else {}
    forcing = Forcing(TIMES, VALUES, kind=kind, **settings)
    times = torch.cat([INSIDE, torch.tensor([2.2, 2.49], dtype=torch.float64)]) if periodic else INSIDE
    wanted = torch.as_tensor(oracle(kind, periodic)(times.numpy()))
    assert distance(forcing(times), wanted) < 1e-12
    assert distance(one_by_one(forcing, times), wanted) < 1e-12
    if periodic:
        for shift in (-2, 3):
            moved = times[1:2] + shift * PERIOD
            assert distance(forcing(moved), wanted[1:2]) < 1e-12
            assert distance(one_by_one(forcing, moved), wanted[1:2]) < 1e-12


@pytest.mark.parametrize("kind", ["linear", "hermite", "cubic"])
@pytest.mark.parametrize("form", ["alone", "together"])
def test_derivatives_with_respect_to_times_are_those_of_scipy(kind: str, form: str) -> None:
    forcing = Forcing(TIMES, VALUES, kind=kind)
    times = torch.tensor([0.1, 0.65, 1.9], dtype=torch.float64, requires_grad=True)
    found = forcing(times) if form == "together" else one_by_one(forcing, times)
    (slopes,) = torch.autograd.grad(found[:, 1].sum(), times)
    at = times.detach().numpy()
    wanted = (oracle(kind)(at + 1e-6) - oracle(kind)(at - 1e-6))[:, 1] / 2e-6
    if kind != "linear":
        wanted = oracle(kind)(at, 1)[:, 1]
    assert slopes.numpy() == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("periodic", [False, True], ids=["once", "periodic"])
@pytest.mark.parametrize("kind", ["previous", "next", "linear", "hermite", "cubic"])
def test_values_have_gradients_and_the_derivatives_of_constant_ones(kind: str, periodic: bool) -> None:
    settings: dict[str, Any] = {"outside": "periodic", "period": PERIOD} if periodic else {}
    learnt = Forcing(TIMES, nn.Parameter(VALUES.clone()), kind=kind, **settings)
    constant = Forcing(TIMES, VALUES, kind=kind, **settings)
    assert distance(learnt(INSIDE).detach(), constant(INSIDE)) < 1e-13
    assert [name for name, _ in learnt.named_parameters()] == ["values"]
    # The interpolant is linear in its values: the gradient along a direction is the interpolant of the direction.
    along = random(5, 2, seed=9)
    for found in (learnt(INSIDE), one_by_one(learnt, INSIDE)):
        weights = random(*found.shape, seed=3)
        (gradient,) = torch.autograd.grad((found * weights).sum(), learnt.values)
        expected = (Forcing(TIMES, along, kind=kind, **settings)(INSIDE) * weights).sum()
        assert float((gradient * along).sum()) == pytest.approx(float(expected), rel=1e-12)


def test_given_slopes_are_those_of_the_cubic_and_may_be_learnt() -> None:
    slopes = nn.Parameter(random(5, 2, seed=4))
    forcing = Forcing(TIMES, VALUES, kind="hermite", slopes=slopes)
    wanted = CubicHermiteSpline(TIMES, VALUES.numpy(), slopes.detach().numpy())(INSIDE.numpy())
    assert distance(forcing(INSIDE).detach(), torch.as_tensor(wanted)) < 1e-13
    forcing(INSIDE).sum().backward()
    assert slopes.grad is not None
    assert set(dict(forcing.named_buffers())) == {"values"}


def test_outside_of_the_times_values_are_refused_or_held() -> None:
    forcing = Forcing(TIMES, VALUES)
    message = r"t = 2.5: the forcing is known from 0 to 2: must be between them, or outside = 'hold'"
    for t in (2.5, torch.tensor([0.1, 2.5])):
        with pytest.raises(ConfigurationError, match=message):
            forcing(t)
    held = Forcing(TIMES, VALUES, kind="cubic", outside="hold")
    assert torch.equal(held(-1.0), held(0.0))
    assert torch.equal(held(torch.tensor([3.0, -2.0])), VALUES[[4, 0]])
    time = torch.tensor(3.0, requires_grad=True)
    assert not held(time).requires_grad or torch.autograd.grad(held(time).sum(), time)[0] == 0


def test_a_time_that_rounding_moved_beyond_the_end_is_the_end() -> None:
    forcing = Forcing([0.0, 0.1], VALUES[:2])
    assert torch.equal(forcing(torch.tensor(0.1, dtype=torch.float32)), VALUES[1])
    assert torch.equal(forcing(torch.tensor([0.1], dtype=torch.float32))[0], VALUES[1])


def test_jumps_are_the_knots_that_are_not_smooth_enough() -> None:
    knots = tuple(TIMES.tolist())
    assert Forcing(TIMES, VALUES, kind="previous").jumps == knots
    assert Forcing(TIMES, VALUES).jumps == knots
    assert Forcing(TIMES, VALUES).jumps_between(0.0, 2.0, derivative=0) == ()
    assert Forcing(TIMES, VALUES, kind="cubic").jumps == ()
    assert Forcing(TIMES, VALUES, kind="cubic", outside="hold").jumps == (0.0, 2.0)
    assert Forcing(TIMES, VALUES, kind="hermite").jumps_between(0.5, 1.8, derivative=2) == (0.7, 1.6)
    periodic = Forcing(TIMES, VALUES, outside="periodic", period=PERIOD)
    assert periodic.jumps_between(1.9, 3.0) == pytest.approx((2.0, 2.5, 2.8))
    assert periodic.jumps_between(-1.0, -0.4) == pytest.approx((-0.9, -0.5))
    with pytest.raises(ConfigurationError, match="jumps_between"):
        _ = periodic.jumps


@pytest.mark.parametrize("kind", ["previous", "next", "linear"])
def test_a_solve_with_its_jumps_is_exact_between_the_knots(kind: str) -> None:
    forcing = Forcing(TIMES, nn.Parameter(VALUES.clone()), kind=kind)
    found = odeint(lambda t, u: forcing(t), torch.zeros(2, dtype=torch.float64), [0.0, 2.0], jumps=forcing.jumps)[-1]
    lengths = torch.as_tensor(np.diff(TIMES))[:, None]
    before, after = forcing.values[:-1], forcing.values[1:]
    mean = {"previous": before, "next": after, "linear": (before + after) / 2}[kind]
    wanted = (lengths * mean).sum(0)
    assert distance(found, wanted) < 1e-13
    own, expected = (torch.autograd.grad(state.sin().sum(), forcing.values)[0] for state in (found, wanted))
    assert distance(own, expected) < 1e-13


class Driven(nn.Module):
    def __init__(self, forcing: Forcing) -> None:
        super().__init__()
        self.forcing, self.rate = forcing, nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.forcing(t) - self.rate * u


def test_gradients_of_a_solve_with_a_learnt_spline_are_those_of_plain_torch() -> None:
    f = Driven(Forcing(TIMES, nn.Parameter(VALUES.clone()), kind="cubic"))
    u0 = random(3, 2)
    found = odeint(f, u0, [0.0, 2.0], step_size=0.1)[-1]
    wanted = odeint_plain(f, u0, [0.0, 2.0], TABLEAUX["4"], 0.1)[-1]
    own, expected = (torch.autograd.grad(state.sin().sum(), [*f.parameters()]) for state in (found, wanted))
    assert distance([found, *own], [wanted, *expected]) < 1e-12


def test_a_narrow_compute_type_keeps_the_times_of_the_knots() -> None:
    times = np.array([1e6, 1e6 + 0.01, 1e6 + 0.02])
    f = Driven(Forcing(times, VALUES[:3])).to(torch.float32)
    assert f.forcing.values.dtype == torch.float32
    assert distance(f.forcing(torch.tensor(1e6 + 0.01, dtype=torch.float64)), VALUES[1].float()) < 1e-6


def test_other_tensors_with_a_gradient_are_named_as_parameters() -> None:
    base = VALUES.clone().requires_grad_()
    values = 2 * base
    forcing, u0 = Forcing(TIMES, values), torch.zeros(2, dtype=torch.float64)
    found = odeint(lambda t, u: forcing(t), u0, [0.0, 2.0], params=[values], step_size=0.1)[-1]
    assert float(torch.autograd.grad(found.sum(), base)[0].abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", ["previous", "linear", "cubic"])
def test_a_solve_with_a_forcing_can_be_compiled(kind: str) -> None:
    f, u0 = Driven(Forcing(TIMES, nn.Parameter(VALUES.clone()), kind=kind)), random(3, 2)
    jumps = f.forcing.jumps
    compiled, eager = (NeuralODE(f, step_size=0.1, jumps=jumps, compile=way) for way in ("aot_eager", False))
    states = [node(u0, [0.0, 2.0])[-1] for node in (compiled, eager)]
    gradients = [torch.autograd.grad(state.sum(), [*f.parameters()]) for state in states]
    assert distance(*states) < 1e-13
    assert distance(*gradients) < 1e-13


def test_dates_are_numbers_of_a_unit_after_an_origin() -> None:
    dates = np.array(["2020-01-01", "2020-01-02", "2020-01-04"], dtype="datetime64[D]")
    forcing = Forcing(dates, VALUES[:3], unit="h")
    assert forcing.knots == (0.0, 24.0, 72.0)
    assert Forcing(dates, VALUES[:3], unit="D", origin="2020-01-02").knots == (-1.0, 0.0, 2.0)
    for keywords, message in (
        ({}, "unit = None: must be the unit of t"),
        ({"unit": "fortnight"}, "unit = 'fortnight'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Forcing(dates, VALUES[:3], **keywords)


def test_an_array_of_xarray_gives_times_and_values() -> None:
    xarray = pytest.importorskip("xarray")
    dates = np.array(["2020-01-01", "2020-01-02", "2020-01-04"], dtype="datetime64[ns]")
    array = xarray.DataArray(VALUES[:3].numpy().T, dims=("x", "time"), coords={"time": dates})
    forcing = Forcing.from_xarray(array, unit="D", kind="previous")
    assert forcing.knots == (0.0, 1.0, 3.0)
    assert torch.equal(forcing(1.5), VALUES[1])
    with pytest.raises(ConfigurationError, match="time = 'date': must be an axis with a coordinate"):
        Forcing.from_xarray(array, time="date")


def test_a_copy_of_the_values_is_held() -> None:
    array = VALUES.numpy().copy()
    forcing = Forcing(TIMES, array)
    array[:] = 0
    assert torch.equal(forcing(0.3), VALUES[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "quadratic"}, "kind = 'quadratic': must be one of previous, next, linear, hermite, cubic"),
        ({"outside": "zero"}, "outside = 'zero': must be one of raise, hold, periodic"),
        ({"slopes": VALUES}, "slopes: kind = 'linear' has its own"),
        ({"kind": "hermite", "slopes": VALUES[:, :1]}, r"slopes: shape \(5, 1\): must be that of values"),
        ({"period": 3.0}, "period = 3.0: must be None"),
        ({"outside": "periodic"}, "period = None: must be longer than the span of times, 2:"),
        ({"outside": "periodic", "period": 2.0}, "period = 2.0: must be longer"),
        ({"times": [0.0, 1.0, 1.0, 2.0, 3.0]}, "times: .* increases strictly"),
        ({"times": [[0.0]]}, r"times: shape \(1, 1\)"),
        ({"times": [0.0]}, "times: 1: must be two or more"),
        ({"values": VALUES[:4]}, r"values: shape \(4, 2\) for 5 times"),
        ({"values": torch.ones(5, dtype=torch.int64)}, "values: torch.int64: must be of a floating"),
        ({"values": VALUES / 0}, "values: must be finite"),
        ({"unit": "D"}, "unit = 'D', origin = None: must be None for times that are numbers"),
        ({"times": [0.0, 1.0], "values": VALUES[:2], "kind": "hermite"}, "kind = 'hermite' without slopes"),
        ({"times": np.arange(5000.0), "values": torch.ones(5000), "kind": "cubic"}, "must be at most 4096"),
    ],
)
def test_other_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Forcing(**{"times": TIMES, "values": VALUES, **arguments})
