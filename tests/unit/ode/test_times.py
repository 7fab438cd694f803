"""Output times: how they are subdivided, and which are refused."""

from itertools import pairwise, product

import pytest
import torch

from pnode_dist import NeuralODE, odeint
from pnode_dist.ode.time_grid import time_grid
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import steps_between


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -u


U0 = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("times", "step_size"),
    [
        ([0.0, 1.0], None),
        ([0.0, 1.0], 0.3),
        ([0.0, 0.3, 1.0, 1.05], 0.1),
        ([2.0, 1.3, -0.4], 0.25),
        ([0.0, 1.0], 5.0),
        ([1e6, 1e6 + 1.0], 0.125),
    ],
)
def test_every_interval_is_cut_into_equal_steps_no_longer_than_asked(
    times: list[float], step_size: float | None
) -> None:
    grid = time_grid(times, step_size)
    intervals = [steps_between(a, b, step_size) for a, b in pairwise(times)]
    wanted = [step for interval in intervals for step in interval]
    assert grid.starts == pytest.approx([start for start, _ in wanted])
    assert grid.sizes == pytest.approx([size for _, size in wanted])
    ends = [sum(len(interval) for interval in intervals[:k]) for k in range(len(times))]
    assert grid.outputs == {step: number for number, step in enumerate(ends)}
    assert grid.steps == len(wanted)
    if step_size is not None:
        assert all(abs(size) <= step_size * (1 + 1e-9) for size in grid.sizes)


def test_an_interval_of_three_steps_but_for_rounding_takes_three() -> None:
    assert time_grid([0.0, 0.1 + 0.2], 0.1).steps == 3
    assert time_grid([0.0, 0.3], 0.1).steps == 3


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, "tensor"),
        *product((torch.float64, torch.float32, torch.float16), ("tensor", "list", "numpy")),
    ],
)
def test_a_linspace_of_step_size_takes_one_step_an_interval_in_any_type(dtype: torch.dtype, kind: str) -> None:
    times = torch.linspace(0.0, 1.0, 11, dtype=torch.float64).to(dtype)
    given = {"tensor": times, "list": times.tolist(), "numpy": None if kind != "numpy" else times.numpy()}[kind]
    assert time_grid(given, 0.1).steps == 10
    assert time_grid(given, 0.05).steps == 20
    node = NeuralODE(decay, step_size=0.1)
    node(U0, given)
    assert node.last_solve.forward_steps == 10


def test_a_float32_linspace_takes_ten_steps_and_not_sixteen() -> None:
    times = torch.linspace(0.0, 1.0, 11)
    assert times.dtype == torch.float32
    for given in (times, times.tolist(), times.numpy(), times + 3, (times - 1).flip(0)):
        assert time_grid(given, 0.1).steps == 10


def test_a_long_linspace_of_doubles_takes_one_step_an_interval() -> None:
    assert time_grid(torch.linspace(0.0, 1000.0, 100001, dtype=torch.float64), 0.01).steps == 100000


@pytest.mark.parametrize("step_size", [0.0999, 0.0332, 0.3, 0.07])
@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 255.0], [0.0, 0.5, 1.25], [0.0, 0.7, 1.3], [0.1, 0.9]])
def test_times_that_carry_no_rounding_are_never_given_longer_steps(times: list[float], step_size: float) -> None:
    grid = time_grid(times, step_size)
    assert all(size <= step_size * (1 + 1e-9) for size in grid.sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_steps_are_at_most_a_tenth_longer_than_asked_for_where_times_are_coarse(dtype: torch.dtype) -> None:
    for start in (0.0, 1.0, 100.0):
        times = (start + torch.rand(200, generator=torch.Generator().manual_seed(0)).cumsum(0)).to(dtype).unique()
        for step_size in (0.01, 0.1, 0.3):
            sizes = time_grid(times, step_size).sizes
            assert max(sizes) <= step_size * 1.1 * (1 + 1e-12)


def test_func_sees_the_stage_times_as_0_dimensional_tensors_of_u_s_type() -> None:
    seen: list[torch.Tensor] = []

    def func(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return -u

    odeint(func, U0.float(), [0.0, 0.5, 0.75], method="rk4")
    assert all(t.shape == () and t.dtype == torch.float32 for t in seen)
    assert [float(t) for t in seen] == [0.0, 0.25, 0.25, 0.5, 0.5, 0.625, 0.625, 0.75]
    seen.clear()
    odeint(func, U0, [0.75, 0.5], method="rk4")
    assert [float(t) for t in seen] == [0.75, 0.625, 0.625, 0.5]


@pytest.mark.parametrize(
    "times", [[0.0, 0.4], (0.0, 0.4), torch.tensor([0.0, 0.4]), torch.tensor([0.0, 0.4], dtype=torch.float64)]
)
def test_times_may_be_a_list_a_tuple_or_a_tensor(times: object) -> None:
    found = odeint(decay, U0, times, method="8vr")  # type: ignore[arg-type]
    assert found.shape == (2, 2)
    assert float(found[-1, 0]) == pytest.approx(0.670320046, rel=1e-7)


def test_a_single_output_time_gives_the_initial_state_and_its_gradient() -> None:
    network, u0 = Network(), random(2, 3).requires_grad_()
    found = odeint(network, u0, [0.3])
    assert found.shape == (1, 2, 3)
    assert torch.equal(found[0], u0)
    weight = random(1, 2, 3, seed=3)
    (weight * found).sum().backward()
    assert u0.grad is not None
    assert torch.equal(u0.grad, weight[0])
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("times", "complaint"),
    [
        ([], "one or more"),
        ([0.0, 0.0], "strictly"),
        ([0.0, 1.0, 0.5], "strictly"),
        ([1.0, 0.0, 0.5], "strictly"),
        ([0.0, float("nan")], "finite"),
        ([0.0, float("inf")], "finite"),
        (torch.zeros(2, 2), "one-dimensional"),
        (torch.tensor(1.0), "one-dimensional"),
    ],
)
def test_times_that_make_no_sense_are_refused(times: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        odeint(decay, U0, times)  # type: ignore[arg-type]
    assert str(caught.value).startswith("t must")


@pytest.mark.parametrize("step_size", [0.0, -0.1, float("nan"), float("inf")])
def test_a_step_size_that_is_not_positive_is_refused(step_size: float) -> None:
    with pytest.raises(ValueError, match=r"step_size = .*must be positive"):
        odeint(decay, U0, [0.0, 1.0], step_size=step_size)


def test_backward_in_time_undoes_forward_in_time() -> None:
    node, u0 = NeuralODE(Network(), method="8vr", step_size=0.05), random(4, 3)
    there = node(u0, [0.0, 1.0])[-1]
    back = node(there, [1.0, 0.0])[-1]
    assert distance(back, u0) < 1e-11
