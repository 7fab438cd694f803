"""Whatever is kept, the gradient has the same bits, and costs what the schedule says."""

from pathlib import Path

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory
from tests.oracles.checkpointing import fewest_solve_steps
from tests.oracles.right_hand_sides import Network, distance, gradients, identical, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES, STEPS = [0.0, 0.5, 0.7, 1.3], 13
METHODS = {"rk4": "4", "dopri5": "5dp", "bosh3": "3bs", "euler": "1fe", "midpoint": "2b", "verner8": "8vr"}
SLOTS = [(4, 0), (2, 4), (1, 0), (0, 3), (0, 1), (3, 1), (12, 0), (0, 12)]


def results(node: NeuralODE, u0: torch.Tensor, times: list[float]) -> tuple[torch.Tensor, ...]:
    return gradients(lambda u: node(u, times), u0, list(node.parameters()))


@pytest.mark.parametrize("times", [TIMES, TIMES[::-1]], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_has_the_same_bits_under_every_budget(method: str, times: list[float], tmp_path: Path) -> None:
    network, u0 = Network(), random(2, 3)
    node = NeuralODE(network, method=method, step_size=0.1, trajectory=Trajectory("1MiB"))
    ample = results(node, u0, times)
    for trajectory in (Trajectory(ram=5000), Trajectory(keep="solution"), Trajectory(keep="graph")):
        node.trajectory = trajectory
        assert identical(results(node, u0, times), ample), trajectory
    for ram, disk in SLOTS:
        node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path)
        assert identical(results(node, u0, times), ample), (ram, disk)
        solve = node.last_solve
        assert (solve.forward_steps, solve.adjoint_steps) == (STEPS, STEPS)
        assert solve.forward_steps + solve.recomputed_steps == fewest_solve_steps(STEPS, ram + disk)
        assert solve.checkpoint_bytes_peak == min(ram + disk, STEPS - 2) * u0.numel() * 8
        assert (solve.bytes_written > 0) == (solve.bytes_read > 0) == (disk > 0)
    wanted = gradients(
        lambda u: odeint_plain(network, u, times, TABLEAUX[METHODS[method]], 0.1), u0, list(network.parameters())
    )
    assert all(distance(f, w) <= 1e-12 for f, w in zip(ample, wanted, strict=True))


def test_a_float32_gradient_has_the_same_bits_under_every_budget(tmp_path: Path) -> None:
    network, u0 = Network(dtype=torch.float32), random(2, 3, dtype=torch.float32)
    node = NeuralODE(network, step_size=0.1)
    ample = results(node, u0, TIMES)
    for ram, disk in SLOTS:
        node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path)
        assert identical(results(node, u0, TIMES), ample), (ram, disk)


def test_a_tuple_s_gradient_has_the_same_bits_under_every_budget(tmp_path: Path) -> None:
    a, b = random(2, 3).requires_grad_(), random(4, seed=3).requires_grad_()

    def func(t: torch.Tensor, u: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.sin(u[0]) * u[1].mean(), torch.cos(t + u[1]) + u[0].sum()

    node = NeuralODE(func, step_size=0.1)

    def gradient() -> tuple[torch.Tensor, ...]:
        x, y = node((a, b), TIMES)
        return torch.autograd.grad((x**2).sum() + torch.sin(y).sum(), [a, b])

    ample = gradient()
    for ram, disk in SLOTS:
        node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path)
        assert identical(gradient(), ample), (ram, disk)


@pytest.mark.parametrize(("ram", "disk"), [(2, 0), (0, 2), (1, 2)])
def test_solves_whose_lives_overlap_keep_their_own_checkpoints(ram: int, disk: int, tmp_path: Path) -> None:
    network = Network()
    node = NeuralODE(network, step_size=0.1)
    starts = [random(2, 3, seed=k).requires_grad_() for k in range(3)]
    wanted = [results(node, start.detach(), TIMES)[1] for start in starts]
    node.trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path)
    solutions = [node(start, TIMES) for start in starts]
    for k in (1, 0, 2):
        (found,) = torch.autograd.grad(torch.sin(solutions[k]).sum(), [starts[k]])
        assert torch.equal(found, wanted[k])


@pytest.mark.parametrize(("ram", "disk"), [(3, 0), (1, 3)])
def test_the_gradient_of_a_long_solve_is_that_of_plain_torch(ram: int, disk: int, tmp_path: Path) -> None:
    network, u0 = Network(), random(3)
    trajectory = Trajectory(ram_slots=ram, disk_slots=disk, directory=tmp_path)
    node = NeuralODE(network, method="midpoint", step_size=0.01, trajectory=trajectory)
    found = results(node, u0, [0.0, 2.0])
    wanted = gradients(
        lambda u: odeint_plain(network, u, [0.0, 2.0], TABLEAUX["2b"], 0.01), u0, list(network.parameters())
    )
    assert all(distance(f, w) <= 1e-12 for f, w in zip(found, wanted, strict=True))
    assert node.last_solve.forward_steps + node.last_solve.recomputed_steps == fewest_solve_steps(200, ram + disk)
