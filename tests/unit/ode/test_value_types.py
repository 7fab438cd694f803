"""Values of f that the state's type cannot hold are refused at that evaluation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint

START = torch.ones(2, dtype=torch.float64)
TIMES = [0.0, 1.0]
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "complex128": lambda u: u * (1 + 2j),
    "complex64": lambda u: (u * 1j).to(torch.complex64),
    "int64": lambda u: torch.ones_like(u, dtype=torch.int64),
    "bool": lambda u: u > 0,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn", "ssp_rks2"])
def test_du_dt_that_is_not_real_is_refused_in_one_line(method: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"func returned torch.{name} for a state of torch.float64") as caught:
        odeint(lambda t, u: WRONG[name](u), START, TIMES, method=method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", ["solution", "stages", "graph"])
def test_a_complex_du_dt_is_refused_where_a_gradient_is_asked_for(keep: str) -> None:
    start = START.clone().requires_grad_()
    with pytest.raises(TypeError, match="complex128"):
        odeint(lambda t, u: u * (1 + 2j), start, TIMES, trajectory=Trajectory(ram="1MiB", keep=keep))


def test_a_part_of_a_tuple_that_is_complex_is_refused() -> None:
    with pytest.raises(TypeError, match="complex128"):
        odeint(lambda t, u: (u[1], u[0] * 1j), (START, START), TIMES)


def test_a_du_dt_that_turns_complex_later_is_refused_then() -> None:
    node = NeuralODE(lambda t, u: -u if t < 0.5 else -u * (1 + 0j), step_size=0.25)
    with pytest.raises(TypeError, match="complex128"):
        node(START, TIMES)
    assert torch.isfinite(node(START, [0.0, 0.25])).all()


def test_a_du_dt_of_another_real_type_is_converted() -> None:
    found = odeint(lambda t, u: -u.float(), START, TIMES, step_size=0.1)[-1]
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.exp(-START), rtol=1e-5, atol=0)
