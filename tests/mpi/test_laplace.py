"""The Laplace approximation at every number of ranks: of a linear problem it is the posterior in closed form."""

from __future__ import annotations

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

from pnode_dist import ConfigurationError, ConvergenceError, GridPartition, Mesh, NeuralODE
from pnode_dist.exchange import halo
from pnode_dist.inverse import (
    Control,
    Gaussian,
    GridCovariance,
    Inverse,
    Laplace,
    ModelError,
    Observation,
    Points,
    forecast_spread,
    laplace,
)
from tests.mpi.grids import block
from tests.oracles.assimilation import matern_root, second_difference, states_at
from tests.oracles.right_hand_sides import random
from tests.tiers import at_night

pytestmark = pytest.mark.mpi

SHAPE, STEP, TIMES, LATER = (5, 6), 0.1, (0.2, 0.5), 0.7
BOUNDARY, PERIODIC = ("replicate", "periodic"), [False, True]
POINTS = [[0.0, 5.0], [3.0, 2.0], [4.0, 0.0]]
DIFFUSION, DEVIATION, LENGTH, SPACING = 0.3, 0.4, 0.5, (0.25, 0.2)
NOISE, SOURCE_VARIANCE, JUMP_VARIANCE = 0.01, 0.5, 0.02
CELLS = SHAPE[0] * SHAPE[1]


class Heat(nn.Module):
    """du/dt = diffusion laplacian(u) + source, on a partitioned grid; linear in u and in the source."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        self.partition = partition
        self.source = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        wide = halo(u, self.partition, 1)
        along_y = wide[2:, 1:-1] - 2 * u + wide[:-2, 1:-1]
        along_x = wide[1:-1, 2:] - 2 * u + wide[1:-1, :-2]
        return DIFFUSION * (along_y + along_x) + self.source


def problem_on(comm: MPI.Comm | Mesh, jump: bool = False) -> Inverse:
    """The initial state and the source, with errors of the model at the first time if there is a `jump`."""
    partition = GridPartition(comm, SHAPE, 1, BOUNDARY)
    heat = Heat(partition)
    points = Points(partition, POINTS)
    covariance = GridCovariance(partition, DEVIATION, LENGTH, SPACING)
    return Inverse(
        NeuralODE(heat, step_size=STEP, partition=partition),
        [
            Control(block(partition, random(*SHAPE, 1)), prior=Gaussian(0.0, covariance)),
            Control(heat.source, prior=Gaussian(0.0, SOURCE_VARIANCE)),
        ],
        [Observation(TIMES, points, points.part_of(random(2, 3, 1, seed=6)), NOISE)],
        model_error=ModelError([TIMES[0]], JUMP_VARIANCE) if jump else None,
    )


def final_states(controls: torch.Tensor) -> torch.Tensor:
    """The states `[time, cell]` at `TIMES` and `LATER` in plain torch, from the controls of the whole grid."""
    second = [torch.from_numpy(second_difference(n, wraps)) for n, wraps in zip(SHAPE, PERIODIC, strict=True)]

    def f(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return DIFFUSION * (second[0] @ u + u @ second[1]) + controls[CELLS]

    jumps = {TIMES[0]: controls[CELLS + 1 :].view(SHAPE)} if len(controls) > CELLS + 1 else None
    states = states_at(f, controls[:CELLS].view(SHAPE), [0.0, *TIMES, LATER], STEP, jumps)
    return torch.stack([states[time].reshape(-1) for time in (*TIMES, LATER)])


def closed_form(jump: bool) -> torch.Tensor:
    """The covariance `[control, control]` after the observations: the inverse of the sum of two inverses."""
    size = CELLS + 1 + (CELLS if jump else 0)
    places = [int(y) * SHAPE[1] + int(x) for y, x in POINTS]
    observed = torch.func.jacrev(lambda m: final_states(m)[:2, places].reshape(-1))(random(size, seed=2))
    prior = torch.zeros(size, size, dtype=torch.float64)
    root = matern_root(SHAPE, [LENGTH / width for width in SPACING], PERIODIC) * DEVIATION
    prior[:CELLS, :CELLS] = root @ root.T
    prior[CELLS, CELLS] = SOURCE_VARIANCE
    prior[CELLS + 1 :, CELLS + 1 :] = JUMP_VARIANCE * torch.eye(size - CELLS - 1, dtype=torch.float64)
    return torch.linalg.inv(torch.linalg.inv(prior) + observed.T @ observed / NOISE)


def packed(problem: Inverse, whole: torch.Tensor) -> PETSc.Vec:
    """The Vec of whole controls."""
    partition = problem.node.settings.partition
    state, source, *jump = whole.split([CELLS, 1, CELLS][: 2 + (len(whole) > CELLS + 1)])
    fields = [block(partition, field.reshape(*SHAPE, 1)) for field in (state, *jump)]
    return problem.space.pack([fields[0], source.reshape(()), *fields[1:]])


@pytest.mark.parametrize("jump", at_night([False, True], but=[True]), ids=["strong", "weak"])
def test_the_covariance_of_a_heat_equation_is_that_in_closed_form(jump: bool, mesh: Mesh) -> None:
    problem, wanted = problem_on(mesh, jump), closed_form(jump)
    found = laplace(problem, problem.space.guess(), 6, oversampling=2)
    assert len(found.eigenvalues) == 6
    assert list(found.eigenvalues) == sorted(found.eigenvalues, reverse=True)
    for seed in range(3):
        v = random(len(wanted), seed=seed)
        image, solved = packed(problem, wanted @ v), packed(problem, torch.linalg.solve(wanted, v))
        assert (found.multiply(packed(problem, v)) - image).norm() <= 1e-8 * image.norm()
        assert (found.solve(packed(problem, v)) - solved).norm() <= 1e-8 * solved.norm()
    variances = packed(problem, wanted.diagonal())
    assert (found.variances() - variances).norm() <= 1e-8 * variances.norm()


@pytest.mark.nightly
def test_a_sample_has_the_covariance(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_on(mesh)
    m = problem.space.guess()
    found = laplace(problem, m, 6, oversampling=0)
    drawn, draw = [], problem.space.random
    monkeypatch.setattr(problem.space, "random", lambda seed: drawn.append(draw(seed)) or drawn[-1].copy())
    for number in range(3):
        sample = found.sample(4, number) - m
        assert sample.dot(found.solve(sample)) == pytest.approx(drawn[-1].dot(drawn[-1]), rel=1e-9)
    assert (drawn[0] - drawn[1]).norm() > 1


@pytest.mark.nightly
def test_eigenvalues_and_samples_do_not_depend_on_the_number_of_ranks(mesh: Mesh) -> None:
    problem, alone = problem_on(mesh), problem_on(MPI.COMM_SELF)

    def approximation(of: Inverse) -> Laplace:
        return laplace(of, of.space.guess(), 3, oversampling=1, seed=8)

    found, wanted = approximation(problem), approximation(alone)
    assert found.eigenvalues == pytest.approx(wanted.eigenvalues, rel=1e-9)
    state, source = alone.space.unpack(wanted.sample(5))
    whole = packed(problem, torch.cat([state.reshape(-1), source.reshape(-1)]))
    assert (found.sample(5) - whole).norm() <= 1e-8 * whole.norm()


@pytest.mark.nightly
def test_a_forecast_with_spread_is_that_of_solves_from_samples(mesh: Mesh) -> None:
    problem, alone = problem_on(mesh, jump=True), problem_on(MPI.COMM_SELF, jump=True)
    m, partition = problem.space.guess(), problem.node.settings.partition
    found = laplace(problem, m, 6)
    times = (TIMES[0], LATER)
    spread = forecast_spread(found, times, members=5, seed=3)
    serial = laplace(alone, alone.space.guess(), 6)
    samples = [torch.cat([v.reshape(-1) for v in alone.space.unpack(serial.sample(3, n))]) for n in range(5)]
    states = torch.stack([final_states(sample)[[0, 2]] for sample in samples]).view(5, 2, *SHAPE, 1)
    for part, wanted in ((spread.mean, states.mean(0)), (spread.deviation, states.std(0))):
        assert torch.allclose(part, block(partition, wanted), rtol=1e-7, atol=1e-9)
    assert problem.node.func.source.item() == 0.2
    start = problem.forecast(m, [0.0])[0]
    assert torch.equal(start, problem.space.unpack(m)[0])
    with pytest.raises(ConfigurationError, match="members = 1"):
        forecast_spread(found, times, members=1)
    with pytest.raises(ConfigurationError, match=r"times = \[-1.0\]: must be finite"):
        problem.forecast(m, [-1.0])


@pytest.mark.nightly
def test_what_has_no_approximation_is_refused(mesh: Mesh) -> None:
    partition = GridPartition(mesh, SHAPE, 1, BOUNDARY)
    heat = Heat(partition)
    node = NeuralODE(heat, step_size=STEP, partition=partition)
    u0 = block(partition, random(*SHAPE, 1))
    observed = [Observation(TIMES[1], lambda u: u**2, u0 * 0 + 9, NOISE)]

    def refused(match: str, control: Control, rank: int = 2, hessian: str = "gauss_newton") -> None:
        problem = Inverse(node, [control], observed)
        with pytest.raises(ConfigurationError, match=match):
            laplace(problem, problem.space.guess(), rank, hessian=hessian)

    known = Control(u0, prior=Gaussian(0.0, 1.0))
    refused(r"controls\[0\]: prior = None: must be given", Control(u0))
    refused("rank = 0, oversampling = 10", known, 0)
    refused("hessian = 'newton': must be one of exact", known, hessian="newton")
    refused("m: the Hessian has the eigenvalue -", known, hessian="exact")
    bounded = Control(u0, prior=Gaussian(0.0, 1.0), bounds=(u0, None))
    refused(f"m: {CELLS} of its {CELLS} entries are on their bounds", bounded)


@pytest.mark.nightly
def test_a_sample_whose_forecast_overflows_on_one_rank_is_named_on_all(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_on(mesh)
    found = laplace(problem, problem.space.guess(), 1, oversampling=0)
    forecast = problem.forecast
    scale = torch.inf if mesh.rank == mesh.size - 1 else 1.0
    monkeypatch.setattr(problem, "forecast", lambda m, times: forecast(m, times) * scale)
    with pytest.raises(ConvergenceError, match="the forecast of sample 0 is not finite"):
        forecast_spread(found, [LATER], members=2)
    assert problem.node.func.source.item() == 0.2
