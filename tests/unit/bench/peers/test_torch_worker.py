"""The solvers that are written in torch compute the same numbers, and the right-hand sides are those of NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pnode_dist.bench.peers.cases import CASES, PeerCase, arrays_of, case_of, solvers_of
from pnode_dist.bench.peers.run import difference
from pnode_dist.bench.peers.torch_worker import FUNCTIONS, Flow, prepare

EXACT = [case for case in CASES if case.steps and not case.is_implicit]


def small(case: PeerCase) -> PeerCase:
    """The case in float64 with few points and steps. Its method and right-hand side are the same."""
    small_fields = {"convolution": (1, 2, 6, 5), "turbulence": (8, 6, 2)}
    shape = small_fields.get(case.kind, (3, case.shape[1]))
    return dataclasses.replace(case, shape=shape, hidden=4, dtype="float64", steps=6 if case.steps else 0, end=1.0)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_exact_solvers_have_the_values_and_gradients_of_plain_torch(case: PeerCase) -> None:
    little = small(case)
    expected = prepare(little, "plain torch")[1]()
    # Continuous adjoints are not exact, and torchdiffeq's rk4 is another method.
    exact = {"pnode_dist", "torchode", *(["torchdiffeq"] if case.method == "dopri5" else [])} & {*solvers_of(case)}
    assert "pnode_dist" in exact
    for solver in exact:
        forward, gradient = prepare(little, solver)
        found = gradient()
        assert found.keys() == expected.keys() == {"end", *arrays_of(little)}
        assert difference(found, expected, sorted(expected)) < 1e-12, solver
        assert difference({"end": np.asarray(forward())}, expected, ["end"]) < 1e-12, solver


def test_solvers_with_error_control_agree_within_their_tolerance() -> None:
    case = case_of("adaptive")
    expected = prepare(case, "torchdiffeq")[1]()
    for solver in ("pnode_dist", "torchode"):
        assert difference(prepare(case, solver)[1](), expected, ["end"]) < 20 * case.tolerance, solver


@pytest.mark.parametrize("name", ["stiff euler", "stiff esdirk", "stiff imex"])
def test_stiff_cases_have_the_gradient_of_difference_quotients(name: str) -> None:
    case = dataclasses.replace(case_of(name), shape=(2, 3), steps=3, end=0.15, tolerance=1e-12)
    found = prepare(case, "pnode_dist")[1]()
    arrays, step = arrays_of(case), 1e-4
    losses = []
    for sign in (1, -1):
        rates = arrays["log_rates"] + sign * step * np.array([0.0, 1.0, 0.0])
        forward, _ = prepare(case, "pnode_dist", arrays | {"log_rates": rates})
        losses.append(float(np.square(np.asarray(forward())).mean()))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(found["log_rates"][1], rel=1e-6)


def test_the_trace_of_the_flow_is_that_of_difference_quotients() -> None:
    arrays = arrays_of(small(case_of("flow")))
    flow = Flow(arrays)
    state = torch.from_numpy(arrays["u0"])
    step = 1e-6
    trace = torch.zeros(len(state), dtype=torch.float64)
    for axis in range(2):
        shift = torch.zeros_like(state)
        shift[:, axis] = step
        change = flow(torch.zeros(()), state + shift) - flow(torch.zeros(()), state - shift)
        trace += change[:, axis] / (2 * step)
    torch.testing.assert_close(flow(torch.zeros(()), state)[:, -1], -trace, rtol=1e-7, atol=1e-9)


def test_the_perceptron_is_that_of_numpy() -> None:
    arrays = arrays_of(small(case_of("tiny")))
    expected = np.tanh(arrays["u0"] @ arrays["w1"].T + arrays["b1"]) @ arrays["w2"].T + arrays["b2"]
    found = FUNCTIONS["perceptron"](arrays)(torch.zeros(()), torch.from_numpy(arrays["u0"]))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-13)


def test_the_reactions_are_those_of_numpy_and_conserve_mass() -> None:
    arrays = arrays_of(small(case_of("stiff euler")))
    change = FUNCTIONS["kinetics"](arrays)(torch.zeros(()), torch.from_numpy(arrays["u0"]))
    assert float(change.detach().sum(dim=1).abs().max()) < 1e-12
    a, b, c = arrays["u0"].T
    k1, k2, k3 = np.exp(arrays["log_rates"])
    np.testing.assert_allclose(change[:, 1].detach().numpy(), k1 * a - k2 * b * c - k3 * b * b, rtol=1e-12)
