"""The quasi-geostrophic problem at every number of ranks: losses and gradients of plain torch on the whole grid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import Mesh, odeint
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.problems.qg.closures import closure
from pnode_dist.problems.qg.physics import QGTendency
from pnode_dist.problems.qg.problem import QGProblem
from pnode_dist.verify.gradcheck import gradcheck
from tests.oracles import quasi_geostrophic
from tests.unit.problems.qg.plain_qg import (
    COARSE,
    INTERVAL,
    LENGTH,
    STEP,
    TRAINING,
    WINDOW,
    config,
    damped,
    resolved,
    rollout,
    velocities,
)

pytestmark = pytest.mark.mpi

STARTS = [(0, 0), (1, 1), (0, 2)]
HOUR = 3600.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of all ranks and tests, so that the data is computed once."""
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("qg"))))


@pytest.fixture(scope="module")
def problem(mesh: Mesh, place: Path) -> QGProblem:
    return QGProblem(config(place), mesh, torch.float64)


@pytest.fixture(scope="module")
def whole(problem: QGProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """q and forcing of all trajectories on the whole grid, `[trajectory, time, y, x, 2]`, on every rank."""
    comm, found = problem.partition.comm, []
    for values in problem.trajectories:
        parts = comm.allgather(values.numpy())
        found.append(torch.from_numpy(np.concatenate(parts, axis=2)))
    return found[0], found[1]


def deviations(values: torch.Tensor) -> torch.Tensor:
    return values.square().mean(dim=(0, 1, 2, 3)).sqrt()


def same_closure(problem: QGProblem) -> nn.Module:
    """The closure with the parameters of the problem's, for the whole grid."""
    one_rank = GridPartition(MPI.COMM_SELF, COARSE, 2, ("periodic", "periodic"), 1)
    model = problem.config.model
    found = closure(
        "cnn",
        one_rank,
        channels=model.channels,
        layers=model.layers,
        momentum=model.momentum,
        scales=problem.scales,
        dtype=torch.float64,
        seed=7,
    )
    learnt = problem.model.solve.func.closure
    found.load_state_dict(learnt.state_dict())
    return found


def assert_gradients(problem: QGProblem, expected: nn.Module) -> None:
    learnt = problem.model.solve.func.closure
    for value, wanted in zip(learnt.parameters(), expected.parameters(), strict=True):
        assert wanted.grad is not None
        scale = wanted.grad.abs().max().item()
        torch.testing.assert_close(value.grad, wanted.grad, rtol=0, atol=1e-9 * max(scale, 1e-12))


def test_scales_are_those_of_the_whole_grid(problem: QGProblem, whole: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, forcing = (values[:TRAINING] for values in whole)
    torch.testing.assert_close(problem.scale, deviations(q), rtol=1e-12, atol=0)
    for name, values in zip(("u", "v"), velocities(q), strict=True):
        found = torch.tensor(getattr(problem.scales, name), dtype=torch.float64)
        torch.testing.assert_close(found, deviations(values), rtol=1e-11, atol=0)
    found = torch.tensor(problem.scales.forcing, dtype=torch.float64)
    torch.testing.assert_close(found, deviations(forcing), rtol=1e-12, atol=0)


@pytest.mark.parametrize("applied", ["stages", "steps"])
def test_the_online_loss_and_its_gradient_are_those_of_plain_torch(
    mesh: Mesh, place: Path, whole: tuple[torch.Tensor, torch.Tensor], applied: str
) -> None:
    problem = QGProblem(config(place, model={"applied": applied}), mesh, torch.float64)
    model = parallel(problem.model, mesh)
    share = problem.loss(model, windows(problem.samples, STARTS, WINDOW, torch.float64))
    problem.model.zero_grad()
    share.backward()  # type: ignore[no-untyped-call]
    scale = deviations(whole[0][:TRAINING])
    scaled = whole[0][:TRAINING] / scale
    initial = torch.stack([scaled[start] for start in STARTS])
    targets = torch.stack(
        [torch.stack([scaled[number, first + lead] for number, first in STARTS]) for lead in range(1, WINDOW + 1)]
    )
    change = deviations(resolved(scaled.diff(dim=1)))
    expected = same_closure(problem)
    error = resolved(rollout(initial, scale, WINDOW, expected, applied) - targets) / change
    loss = error.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(loss.item(), rel=1e-9)
    assert_gradients(problem, expected)


def test_the_offline_loss_and_its_gradient_are_those_of_plain_torch(
    mesh: Mesh, place: Path, whole: tuple[torch.Tensor, torch.Tensor]
) -> None:
    problem = QGProblem(config(place, problem={"objective": "offline"}), mesh, torch.float64)
    model = parallel(problem.model, mesh)
    share = problem.loss(model, problem.forcing_batch(STARTS))
    share.backward()  # type: ignore[no-untyped-call]
    q, forcing = (torch.stack([values[start] for start in STARTS]) for values in whole)
    expected = same_closure(problem)
    error = (expected(q, *velocities(q)) - forcing) / deviations(whole[1][:TRAINING])
    loss = error.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert mesh.sum(share).item() == pytest.approx(loss.item(), rel=1e-11)
    assert_gradients(problem, expected)


def test_offline_batches_and_gradients_are_checked(mesh: Mesh, place: Path) -> None:
    problem = QGProblem(config(place, problem={"objective": "offline"}), mesh, torch.float64)
    batches = list(problem.batches(1))
    assert sorted(start for batch in batches for start in batch.starts) == problem.samples.starts(WINDOW)
    assert gradcheck(problem.gradcheck_case(), mesh).failures() == []


def test_the_curriculum_gives_each_epoch_its_window(mesh: Mesh, place: Path) -> None:
    problem = QGProblem(config(place, problem={"window": 3, "curriculum": [[1, 1], [2, 2]]}), mesh, torch.float64)
    lengths = [{len(batch.targets) for batch in problem.batches(epoch)} for epoch in (1, 2, 3, 4, 5)]
    assert lengths == [{1}, {2}, {2}, {3}, {3}]
    assert problem.solve_case().times[-1] == 3 * INTERVAL


@pytest.mark.parametrize("budget", [{"ram_slots": 2, "keep": "solution"}, {"ram": "0", "disk": "1MiB"}])
def test_gradients_within_a_budget_are_those_without(
    budget: dict[str, Any], problem: QGProblem, mesh: Mesh, place: Path
) -> None:
    gradients = []
    for one in (problem, QGProblem(config(place, trajectory=budget), mesh, torch.float64)):
        one.model.zero_grad()
        batch = windows(one.samples, STARTS, WINDOW, torch.float64)
        one.loss(one.model, batch).backward()  # type: ignore[no-untyped-call]
        gradients.append(torch.cat([value.grad.flatten() for value in one.model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-15)


def test_the_forcing_closes_the_coarse_equations(problem: QGProblem) -> None:
    q, forcing = (values[0] for values in problem.trajectories)
    equations = QGTendency(problem.partition, problem.config.problem.parameters)
    seconds = INTERVAL * HOUR

    def closed(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return equations(t, state) + forcing[0] + (forcing[1] - forcing[0]) * (t / seconds)

    errors = []
    for func in (equations, closed):
        with torch.no_grad():
            state = odeint(func, q[0], [0.0, seconds], step_size=STEP * HOUR, partition=problem.partition)[-1]
        squares = problem.mesh.sum(problem.resolved(state - q[1]).square().sum(), over="state")
        errors.append(math.sqrt(squares.item()))
    assert errors[1] <= 0.02 * errors[0]


def test_a_free_run_without_a_closure_is_that_of_numpy(problem: QGProblem) -> None:
    runs = problem.free_runs(2, INTERVAL)
    assert set(runs) == {"truth", "model", "no_closure", "smagorinsky", "backscatter", "zanna_bolton"}
    states = runs["no_closure"].q
    assert (runs["no_closure"].blown_up, len(states)) == (None, 3)
    assert not runs["no_closure"].forcing.any()
    first = problem.partition.comm.allgather(states[0].numpy())
    state = np.moveaxis(np.concatenate(first, axis=0), -1, 0)
    for _ in range(2 * round(INTERVAL / STEP)):
        state = quasi_geostrophic.step(state, LENGTH, STEP * HOUR)
    rows = slice(*problem.partition.owned[0])
    expected = torch.from_numpy(np.ascontiguousarray(np.moveaxis(state, 0, -1)[rows]))
    torch.testing.assert_close(states[2], expected, rtol=0, atol=1e-11 * np.abs(state).max())
    assert not torch.allclose(runs["smagorinsky"].q[2], states[2], rtol=1e-3, atol=0)


def test_long_runs_have_samples_at_their_interval_and_all_of_the_truth(
    problem: QGProblem, whole: tuple[torch.Tensor, torch.Tensor]
) -> None:
    dense, sparse = problem.free_runs(4, INTERVAL), problem.free_runs(5, 2 * INTERVAL)
    torch.testing.assert_close(sparse["no_closure"].q[:3], dense["no_closure"].q[::2], rtol=1e-12, atol=0)
    assert len(sparse["no_closure"].q) == 6
    rows = slice(*problem.partition.owned[0])
    assert torch.equal(dense["truth"].q, whole[0][TRAINING:, :, rows])
    assert torch.equal(sparse["truth"].forcing, whole[1][TRAINING:, ::2, rows])


def test_a_plan_needs_no_fine_runs(problem: QGProblem, mesh: Mesh, tmp_path: Path) -> None:
    case, real = QGProblem.planned(config(tmp_path), mesh, torch.float64).solve_case(), problem.solve_case()
    assert not (tmp_path / "data").exists()
    assert (case.state.shape, case.state.dtype, case.times) == (real.state.shape, real.state.dtype, real.times)
    counts = [sum(value.numel() for value in one.solve.parameters()) for one in (case, real)]
    assert counts[0] == counts[1] > 0
    with torch.no_grad():
        assert bool(torch.isfinite(case.solve(case.state, case.times)).all())


def test_the_published_closures_are_those_that_are_asked_for(mesh: Mesh, place: Path) -> None:
    problem = QGProblem(config(place, evaluation={"compared": ("backscatter",)}), mesh, torch.float64)
    assert list(problem.closures()) == ["no_closure", "backscatter"]
    assert set(problem.baselines(problem.held_out_windows(torch.float64))) == {"persistence", *problem.closures()}


@pytest.mark.parametrize(
    "solver", [{"step_size": 3.0}, {"step_size": STEP, "rtol": 1e-3}, {"step_size": STEP, "jumps": (1.0,)}, {}]
)
def test_a_closure_between_steps_needs_steps_of_one_size(solver: dict[str, Any], mesh: Mesh, place: Path) -> None:
    given = {"step_size": None, **solver}
    with pytest.raises(ConfigurationError, match=r'^\[model\] applied = "steps": needs steps of one size: \[solver\]'):
        QGProblem(config(place, model={"applied": "steps"}, solver=given), mesh, torch.float64)


def test_a_free_run_that_blows_up_is_reported_with_its_day(problem: QGProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "closures", lambda: {"growing": lambda q, u, v: 0.1 * q})
    run = problem.free_runs(20, INTERVAL)["growing"]
    assert run.blown_up is not None
    assert run.blown_up == pytest.approx(len(run.q) * INTERVAL / 24)
    assert len(run.q) < 21
    assert bool(torch.isfinite(run.q).all())
    torch.testing.assert_close(run.forcing, 0.1 * run.q)


def test_the_filter_is_applied_after_each_step(problem: QGProblem) -> None:
    batch = windows(problem.samples, STARTS, 1, torch.float64)
    with torch.no_grad():
        found = problem.build_model(problem.tendency(None))(batch)
    parts = problem.partition.comm.allgather(batch.initial.numpy())
    initial = torch.from_numpy(np.concatenate(parts, axis=1))
    rows = slice(*problem.partition.owned[0])
    expected = rollout(initial, problem.scale, 1)
    torch.testing.assert_close(found, expected[:, :, rows], rtol=0, atol=1e-11)
    assert (damped(expected) - expected).abs().max() < 1e-2


def test_ranks_without_rows_are_refused(mesh: Mesh, place: Path) -> None:
    changed = {"shape": (4, 4), "fine": (8, 8)}
    if mesh.size <= 2:
        QGProblem(config(place, problem=changed, model={"kernel": 5}), mesh, torch.float64)
        return
    with pytest.raises(ConfigurationError, match=rf"^\[mesh\] state = {mesh.size}: grid: processes"):
        QGProblem(config(place, problem=changed, model={"kernel": 5}), mesh, torch.float64)
