"""The field problem at every number of ranks: the same figures as the whole field in plain torch gives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.data import agreed, open_source
from pnode_dist.problems.field.model import windows
from pnode_dist.problems.field.problem import FieldProblem, build_field
from pnode_dist.verify.gradcheck import gradcheck
from tests.unit.problems.field.plain_field import PlainField, fractions_of_year
from tests.unit.problems.field.synthetic_fields import (
    NX,
    NY,
    TIMES,
    VALIDATION,
    WINDOW,
    config,
    dataset,
    field_config,
    land,
    months,
    values,
    write,
)

pytestmark = pytest.mark.mpi

TRAINING, STARTS, LEADS, HARMONICS, SUBSTEPS = TIMES - VALIDATION, [0, 5, 17], 3, 2, 2


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """One directory for all ranks, with the field in it."""
    comm = MPI.COMM_WORLD
    shared = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        write(shared / "sst.nc", dataset(values()))
        write(shared / "two.nc", dataset(values(channels=2)))
    comm.Barrier()
    yield shared
    comm.Barrier()


def build(directory: Path, mesh: Mesh, name: str = "sst.nc", **tables: Any) -> FieldProblem:
    return build_field(config(directory / name, **tables), mesh, torch.float64)


def plain(directory: Path, name: str = "sst.nc", channels: int | None = None) -> PlainField:
    field = values(channels=channels).reshape(TIMES, NY, NX, -1)
    step = open_source(field_config(directory / name)).time.step
    whole = np.where(land()[..., None], np.nan, field)
    return PlainField(whole, fractions_of_year(months()), step, 1.0, (False, True))


def leaves(problem: FieldProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("solve.func."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def own(problem: FieldProblem, whole: torch.Tensor) -> torch.Tensor:
    (y0, y1), (x0, x1) = problem.partition.owned
    return whole[..., y0:y1, x0:x1, :]


@pytest.mark.parametrize(("name", "channels"), [("sst.nc", None), ("two.nc", 2)])
def test_every_rank_holds_its_part_of_the_normalised_field(
    directory: Path, mesh: Mesh, name: str, channels: int | None
) -> None:
    problem, whole = build(directory, mesh, name), plain(directory, name, channels)
    assert problem.field.cells == int(whole.inside.sum())
    for found, expected in zip((problem.field.mean, problem.field.deviation), whole.moments(), strict=True):
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-13, atol=0)
    torch.testing.assert_close(problem.field.values, own(problem, whole.normalised()), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("name", "channels"), [("sst.nc", None), ("two.nc", 2)])
def test_loss_and_gradient_are_those_of_the_whole_field(
    directory: Path, mesh: Mesh, name: str, channels: int | None
) -> None:
    problem = build(directory, mesh, name)
    model = parallel(problem.model, mesh)
    share = problem.loss(model, windows(problem.field, STARTS, LEADS, torch.float64))
    share.backward()  # type: ignore[no-untyped-call]
    expected = leaves(problem)
    whole_loss = plain(directory, name, channels).loss(expected, HARMONICS, STARTS, LEADS, SUBSTEPS)
    whole_loss.backward()
    assert mesh.sum(share).item() == pytest.approx(whole_loss.item(), rel=1e-12)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-10, atol=1e-13)


def test_the_gradient_check_sees_the_loss_of_the_whole_field(directory: Path, mesh: Mesh) -> None:
    problem = build(directory, mesh)
    expected = plain(directory).loss(leaves(problem), HARMONICS, [0], WINDOW, SUBSTEPS)
    result = gradcheck(problem.gradcheck_case(), mesh)
    assert result.failures() == []
    assert result.loss == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_is_that_of_the_whole_field(directory: Path, mesh: Mesh) -> None:
    problem, whole = build(directory, mesh), plain(directory)
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
    starts = list(range(TRAINING - 1, TIMES - 3))
    forecast = whole.forecast(leaves(problem), HARMONICS, starts, 3, SUBSTEPS).detach().numpy()
    mean, deviation = whole.moments()
    kelvin = (forecast * deviation + mean)[..., 0]
    truth = np.stack([whole.field[[start + lead for start in starts], ..., 0] for lead in (1, 2, 3)])
    persistence = np.stack([whole.field[starts, ..., 0]] * 3)
    for number, row in enumerate(table["rmse"]):
        for name, candidate in (("model", kelvin), ("persistence", persistence)):
            error = np.sqrt(np.nanmean((candidate[number] - truth[number]) ** 2))
            assert row[name] == pytest.approx(error, rel=1e-11)
    tables = MPI.COMM_WORLD.allgather(table)
    assert all(other == table for other in tables)
    data = xarray.open_dataset(directory / "forecast.h5", engine="h5netcdf")
    np.testing.assert_allclose(data.truth.to_numpy().swapaxes(0, 1), truth, rtol=1e-6)
    np.testing.assert_allclose(data.forecast.to_numpy().swapaxes(0, 1), np.where(land(), np.nan, kelvin), rtol=1e-6)


def test_what_one_rank_meets_is_raised_on_all(mesh: Mesh) -> None:
    def action() -> None:
        if mesh.rank == mesh.size - 1:
            raise ConfigurationError("the last rank cannot see the file")

    with pytest.raises(ConfigurationError, match="the last rank cannot see the file"):
        agreed(mesh, action)
    assert agreed(mesh, lambda: mesh.rank) == mesh.rank


def test_too_wide_a_halo_for_the_ranks_is_refused_on_all(directory: Path, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match="cannot be split over"):
        build(directory, mesh, model={"dilations": (7,)})
