"""What every registered problem promises at every number of ranks, however they are split into replicas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from mpi4py import MPI

from pnode_dist import ForecastProblem, Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.train.run import build_problem
from pnode_dist.verify.gradcheck import gradcheck
from tests.mpi.agreement import assert_same_on_all_ranks
from tests.mpi.conftest import SPLITS
from tests.oracles.right_hand_sides import distance
from tests.unit.problems.configurations import FORECASTS, SMALL, numbers_in, size_of, trained

pytestmark = pytest.mark.mpi

EVERY = pytest.mark.parametrize("name", SMALL)
COMM = MPI.COMM_WORLD
TIGHT = {"petsc_options": {"snes_rtol": 1e-12, "snes_divergence_tolerance": 1e30}}
# Batches of which the last leaves some of four replicas without any sample.
TABLES: dict[str, dict[str, Any]] = {
    **{name: {"training": {"batch_size": 4}} for name in FORECASTS},
    "flows": {},
    "images": {},
}
TABLES["pendulum"] |= {"solver": TIGHT, "problem": {"window": 1}}
TABLES["robertson"] |= {"solver": TIGHT}
# Implicit steps end at their tolerance, at a different point for every way of adding up norms.
NEAR = {"pendulum": 1e-7, "robertson": 1e-7}
OF_THE_RANKS = ("seconds", "edges_between_ranks", "inversion_error", "log_density_error", "heat_drift", "drift")


@pytest.fixture(autouse=True)
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """How exactly the largest stable step is found does not matter here."""
    monkeypatch.setattr("pnode_dist.problems.semilinear.stable_step.STEPS", 60)


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


@EVERY
def test_batches_losses_and_gradients_are_the_same_on_any_mesh(name: str, directory: Path) -> None:
    config = SMALL[name](directory, **TABLES[name])
    found = {}
    for state, data in dict.fromkeys((SPLITS[0], SPLITS[-1])):
        with Mesh(state, data) as mesh:
            problem = build_problem(config, mesh, torch.float64)
            model = parallel(problem.model, mesh)
            losses, used = [], []
            for batch in list(problem.batches(1))[-2:]:
                used.append(size_of(batch))
                share = problem.loss(model, batch)
                share.backward()  # type: ignore[no-untyped-call]
                losses.append(mesh.sum(share) / data)
            sizes = mesh.sum(torch.tensor(used), over="data")
            gradients = [value.grad.clone() for value in problem.model.parameters() if value.grad is not None]
            found[state, data] = torch.stack(losses), gradients, sizes
    first_losses, first_gradients, first_sizes = found[SPLITS[-1]]
    assert first_sizes[0] == config.training.batch_size > first_sizes[1]
    near = NEAR.get(name, 1e-11)
    for losses, gradients, sizes in found.values():
        assert torch.equal(sizes, first_sizes)
        assert distance(losses, first_losses) <= near
        assert distance(flat(gradients), flat(first_gradients)) <= near


@EVERY
def test_a_batch_with_fewer_samples_than_replicas_is_refused_on_all(name: str, directory: Path) -> None:
    ranks = COMM.size
    config = SMALL[name](directory, training={"batch_size": max(ranks - 1, 1)})
    with Mesh(state=1, data=ranks) as mesh:
        if ranks == 1:
            assert build_problem(config, mesh, torch.float64) is not None
            return
        with pytest.raises(ConfigurationError, match=rf"^\[training\] batch_size = {ranks - 1}: must be at least"):
            build_problem(config, mesh, torch.float64)


@pytest.mark.parametrize("name", FORECASTS)
def test_leads_beyond_the_data_are_refused_on_all(name: str, directory: Path, mesh: Mesh) -> None:
    config = SMALL[name](directory, evaluation={"leads": (1, 999)})
    with pytest.raises(ConfigurationError, match=r"^\[evaluation\] leads = \[1, 999\]: must be at most"):
        build_problem(config, mesh, torch.float64)


@EVERY
@pytest.mark.usefixtures("every_snapshot")
def test_a_resumed_run_ends_with_the_same_parameters_on_all_ranks(name: str, directory: Path, mesh: Mesh) -> None:
    config = SMALL[name](directory, training={"epochs": 1})
    parameters, records = trained(config, mesh, directory)
    resumed, again = trained(config, mesh, directory, step=1)
    assert torch.equal(resumed, parameters)
    assert again == records
    assert_same_on_all_ranks([parameters])


@EVERY
def test_the_gradient_check_finds_the_derivative_of_one_rank(name: str, directory: Path, mesh: Mesh) -> None:
    config = SMALL[name](directory, **({"solver": TIGHT} if name in NEAR else {}))
    result = gradcheck(build_problem(config, mesh, torch.float64).gradcheck_case(), mesh)
    assert result.failures() == []
    enough = {"training": {"batch_size": max(config.training.batch_size, mesh.size)}}
    with Mesh(state=1, data=mesh.size) as replicas:
        one = build_problem(SMALL[name](directory, **enough), replicas, torch.float64)
        alone = gradcheck(one.gradcheck_case(), replicas)
    assert result.loss == pytest.approx(alone.loss, rel=NEAR.get(name, 1e-9))
    assert result.state_size == alone.state_size


def errors_of_whole(problem: ForecastProblem) -> list[dict[str, float]]:
    """The errors at each evaluated lead of forecasts that are held whole. Collective on the state ranks."""
    batch = problem.held_out_windows(torch.float64)
    forecasts = {"model": problem.model(batch), "persistence": batch.initial.expand_as(batch.targets)}
    count = len(batch.starts) * math.prod(batch.samples.partition.global_shape)
    means = {}
    for name, forecast in forecasts.items():
        penalties = problem.penalty(problem.reported(forecast - batch.targets)).flatten(1).sum(dim=1)
        means[name] = problem.mesh.sum(penalties, over="state") / count
    return [{name: problem.figure(mean[lead - 1]) for name, mean in means.items()} for lead in problem.leads]


@EVERY
@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_is_that_of_one_rank(name: str, directory: Path, mesh: Mesh) -> None:
    tables, files = [], []
    with Mesh(state=1, data=mesh.size) as replicas:
        for number, place in enumerate((mesh, replicas)):
            to = directory / str(number)
            to.mkdir(exist_ok=True)
            COMM.Barrier()
            enough = {"training": {"batch_size": max(4, mesh.size)}}
            problem = build_problem(SMALL[name](directory, **enough), place, torch.float64)
            problem.model.eval()
            with torch.no_grad():
                table = problem.evaluate(problem.model, to)
            assert all(other == table for other in COMM.allgather(table))
            if isinstance(problem, ForecastProblem):
                for row, errors in zip(table[problem.error], errors_of_whole(problem), strict=True):
                    assert [row[name] for name in errors] == pytest.approx(list(errors.values()), rel=1e-12)
            tables.append(dict(numbers_in(table)))
            with xarray.open_dataset(to / "forecast.h5", engine="h5netcdf") as data:
                files.append(data.load())
            COMM.Barrier()
    assert tables[0].keys() == tables[1].keys()
    for place, value in tables[0].items():
        if not any(part in place for part in OF_THE_RANKS):
            other = tables[1][place]
            assert value == pytest.approx(other, rel=1e-5, abs=1e-9, nan_ok=True), place
    assert files[0].sizes == files[1].sizes
    for variable, values in files[0].variables.items():
        other = files[1].variables[variable]
        assert values.dims == other.dims
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, other, rtol=1e-4, atol=1e-5, err_msg=str(variable))
        else:
            assert np.array_equal(values, other)
