"""The Gray-Scott equations and initial states on one rank."""

import numpy as np
import pytest
import torch

from pnode_dist import GridPartition, Mesh, NeuralODE
from pnode_dist.problems.gray_scott.config import GrayScottParameters
from pnode_dist.problems.gray_scott.data import reference
from pnode_dist.problems.gray_scott.physics import GrayScott, initial_state
from tests.unit.problems.gray_scott.plain_gray_scott import DOMAIN, NX, NY, rates

PARAMETERS = GrayScottParameters(domain=DOMAIN)


def grid(mesh: Mesh, shape: tuple[int, int] = (NY, NX)) -> GridPartition:
    return GridPartition(mesh, shape, 2, ("periodic", "periodic"))


def test_the_rates_are_those_of_numpy(mesh: Mesh) -> None:
    state = np.random.default_rng(0).uniform(0, 1, (3, NY, NX, 2))
    changed = GrayScottParameters((3e-4, 7e-5), 0.05, 0.02, DOMAIN)
    for parameters in (PARAMETERS, changed):
        found = GrayScott(grid(mesh), parameters)(torch.tensor(0.0), torch.from_numpy(state))
        values = (parameters.diffusion, parameters.feed, parameters.kill, parameters.domain)
        np.testing.assert_allclose(
            found.detach().numpy(), [rates(one, *values) for one in state], rtol=1e-12, atol=1e-14
        )


def test_the_defaults_are_those_of_petscs_example(mesh: Mesh) -> None:
    values = {name: value.item() for name, value in GrayScott(grid(mesh)).named_parameters()}
    assert values == {"diffusion_u": 8e-5, "diffusion_v": 4e-5, "feed": 0.024, "kill": 0.06}
    assert GrayScottParameters().domain == (2.5, 2.5)


def test_the_resting_state_rests_in_either_precision(mesh: Mesh) -> None:
    for dtype in (torch.float32, torch.float64):
        state = torch.tensor([1.0, 0.0], dtype=dtype).expand(NY, NX, 2)
        rate = GrayScott(grid(mesh))(torch.tensor(0.0), state)
        assert rate.dtype == dtype
        assert not rate.any()


def test_the_derivatives_by_state_and_coefficients_are_those_of_finite_differences(mesh: Mesh) -> None:
    equations = GrayScott(grid(mesh, (4, 3)), PARAMETERS)
    state = torch.rand(4, 3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in equations.named_parameters()]
    # Diffusion coefficients are so small that they are perturbed in units of themselves.
    scales = [value.detach() for value in equations.parameters()]
    factors = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in names]

    def function(u: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        values = {name: scale * factor for name, scale, factor in zip(names, scales, factors, strict=True)}
        result: torch.Tensor = torch.func.functional_call(equations, values, (torch.tensor(0.0), u))
        return result

    assert torch.autograd.gradcheck(function, (state, *factors))


def test_a_coefficient_is_found_again_from_a_trajectory(mesh: Mesh) -> None:
    partition = grid(mesh)
    truth = reference(GrayScott(partition, PARAMETERS), initial_state(partition, 0), 3, 4.0)
    guess = GrayScott(partition, GrayScottParameters(kill=0.05, domain=DOMAIN))
    node = NeuralODE(guess, step_size=1.0, partition=partition)
    optimiser = torch.optim.LBFGS([guess.kill], lr=1.0, max_iter=12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss: torch.Tensor = 1e3 * (node(truth[0], [0.0, 4.0, 8.0]) - truth).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    assert guess.kill.item() == pytest.approx(0.06, abs=1e-5)


def test_initial_states_lie_between_rest_and_their_bumps(mesh: Mesh) -> None:
    state = initial_state(grid(mesh, (64, 48)), seed=3)
    assert state.dtype == torch.float64
    assert 0.5 <= state[..., 0].min() < 0.55
    assert 0.2 < state[..., 1].max() <= 0.25
    torch.testing.assert_close(1 - state[..., 0], 2 * state[..., 1])


def test_seed_and_number_choose_the_initial_state(mesh: Mesh) -> None:
    partition = grid(mesh)
    states = [initial_state(partition, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert torch.equal(states[0], initial_state(partition, 0))
    assert all(not torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])


def test_a_finer_grid_has_the_same_initial_state_between_its_points(mesh: Mesh) -> None:
    coarse, fine = (initial_state(grid(mesh, shape), 5) for shape in ((16, 20), (48, 40)))
    torch.testing.assert_close(fine[::3, ::2], coarse, rtol=0, atol=1e-14)


def test_initial_states_are_periodic(mesh: Mesh) -> None:
    state = initial_state(grid(mesh, (64, 64)), seed=0)
    inner = max((state[1:] - state[:-1]).abs().max().item(), (state[:, 1:] - state[:, :-1]).abs().max().item())
    assert (state[0] - state[-1]).abs().max() <= inner
    assert (state[:, 0] - state[:, -1]).abs().max() <= inner
